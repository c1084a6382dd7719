#include "walk.cuh"

namespace lookahead_fused {

const Kernel* find_sgd(Dtype param, Dtype grad) {
    if (param == Dtype::FLOAT32 && grad == Dtype::FLOAT32) return kernel<Sgd, float, float>("sgd of float32");
    if (param == Dtype::BFLOAT16 && grad == Dtype::BFLOAT16) return kernel<Sgd, BFloat16, BFloat16>("sgd of bfloat16");
    if (param == Dtype::BFLOAT16 && grad == Dtype::FLOAT32)
        return kernel<Sgd, BFloat16, float>("sgd of bfloat16 with float32 gradients");
    if (param == Dtype::FLOAT16 && grad == Dtype::FLOAT16) return kernel<Sgd, Float16, Float16>("sgd of float16");
    if (param == Dtype::FLOAT16 && grad == Dtype::FLOAT32)
        return kernel<Sgd, Float16, float>("sgd of float16 with float32 gradients");
    if (param == Dtype::FLOAT64 && grad == Dtype::FLOAT64) return kernel<Sgd, double, double>("sgd of float64");
    if (param == Dtype::FLOAT64 && grad == Dtype::FLOAT32)
        return kernel<Sgd, double, float>("sgd of float64 with float32 gradients");
    return nullptr;
}

}  // namespace lookahead_fused
