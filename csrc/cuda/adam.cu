#include "walk.cuh"

namespace lookahead_fused {

const Kernel* find_adam(Dtype param, Dtype grad) {
    if (param == Dtype::FLOAT32 && grad == Dtype::FLOAT32) return kernel<Adam, float, float>("adam of float32");
    if (param == Dtype::BFLOAT16 && grad == Dtype::BFLOAT16)
        return kernel<Adam, BFloat16, BFloat16>("adam of bfloat16");
    if (param == Dtype::BFLOAT16 && grad == Dtype::FLOAT32)
        return kernel<Adam, BFloat16, float>("adam of bfloat16 with float32 gradients");
    if (param == Dtype::FLOAT16 && grad == Dtype::FLOAT16) return kernel<Adam, Float16, Float16>("adam of float16");
    if (param == Dtype::FLOAT16 && grad == Dtype::FLOAT32)
        return kernel<Adam, Float16, float>("adam of float16 with float32 gradients");
    return nullptr;
}

}  // namespace lookahead_fused
