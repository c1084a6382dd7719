// What every rule is written with: three operations beyond + - * /, and the one interpolation.
//
// The same bits everywhere: each operation is IEEE-754 and rounded once, in the order the source states it. So no
// fused multiply-add (contraction is off in every compiler that reads this), no approximate root or division, no
// library `pow`.
//
// A rule is a template over V, the type it computes in: float or double (CUDA, scalar C++) or a SIMD vector of them.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LF_HD __host__ __device__ __forceinline__
#else
#define LF_HD inline __attribute__((always_inline))
#endif

// Each instruction set compiles these templates anew; without a namespace of its own the linker would keep one copy
// of a weak symbol, and might hand AVX-512 code to a machine that has none.
#if !defined(LF_ISA)
#define LF_ISA portable
#endif

namespace lookahead_fused {
inline namespace LF_ISA {

LF_HD float square_root(float x) { return sqrtf(x); }
LF_HD double square_root(double x) { return sqrt(x); }

// The larger of two; a NaN in `a` wins, as in torch.maximum.
LF_HD float maximum(float a, float b) { return a <= b ? b : a; }
LF_HD double maximum(double a, double b) { return a <= b ? b : a; }

// 1, -1, or +0 for a zero of either sign; a NaN stays one, where torch.sign makes 0 of it.
LF_HD float sign(float x) { return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x + 0.0f; }
LF_HD double sign(double x) { return x > 0.0 ? 1.0 : x < 0.0 ? -1.0 : x + 0.0; }

// beta^n by squaring, in fp64 multiplications alone: a library's pow differs between machines.
LF_HD double power(double beta, int64_t n) {
    double result = 1.0;
    for (; n > 0; n >>= 1) {
        if (n & 1) result = result * beta;
        beta = beta * beta;
    }
    return result;
}

// a + weight * (b - a), exactly a at weight 0 and exactly b at weight 1 (for a finite b - a).
//
// The plain form does not return b at weight 1, since a + (b - a) is rounded; so from weight 1/2 on the difference is
// taken off b. Both halves are one expression, base + factor * (b - a), and the choice of base is the same for every
// element.
template <class T>
struct Lerp {
    T factor;
    int32_t from_a;

    LF_HD static Lerp with(double weight) {
        return weight < 0.5 ? Lerp{static_cast<T>(weight), 1} : Lerp{static_cast<T>(-(1.0 - weight)), 0};
    }

    template <class V>
    LF_HD V operator()(V a, V b) const {
        return (from_a ? a : b) + factor * (b - a);
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
