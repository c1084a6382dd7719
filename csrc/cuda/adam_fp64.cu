#include "walk.cuh"

namespace lookahead_fused {

const Kernel* find_adam_fp64(Dtype param, Dtype grad) {
    if (param == Dtype::FLOAT64 && grad == Dtype::FLOAT64) return kernel<Adam, double, double>("adam of float64");
    if (param == Dtype::FLOAT64 && grad == Dtype::FLOAT32)
        return kernel<Adam, double, float>("adam of float64 with float32 gradients");
    return nullptr;
}

}  // namespace lookahead_fused
