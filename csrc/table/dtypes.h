// The types of elements: what a parameter, its gradient and its moments may be, and what they are computed in. One list
// of types and one of patterns, from which every walk is instantiated and every kernel named.
#pragma once

#include <cstdint>
#include <type_traits>

#include "list.h"

namespace lookahead_fused {

// The two 16-bit formats, as they lie in memory.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
// What stands beside a bf16 parameter for its master: see master.h.
struct LowHalf {
    int16_t bits;
};
// A moment in 8 bits, beside its block's scale: see state/int8.h.
struct Code {
    uint8_t bits;
};

enum class Dtype : int32_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT16, UINT8 };

// A type as it is known in memory, in C++ and, by torch's name for it, in Python.
template <class Type>
struct DtypeOf;
template <>
struct DtypeOf<float> {
    using Type = float;
    static constexpr Dtype value = Dtype::FLOAT32;
    static constexpr const char* name = "float32";
};
template <>
struct DtypeOf<double> {
    using Type = double;
    static constexpr Dtype value = Dtype::FLOAT64;
    static constexpr const char* name = "float64";
};
template <>
struct DtypeOf<BFloat16> {
    using Type = BFloat16;
    static constexpr Dtype value = Dtype::BFLOAT16;
    static constexpr const char* name = "bfloat16";
};
template <>
struct DtypeOf<Float16> {
    using Type = Float16;
    static constexpr Dtype value = Dtype::FLOAT16;
    static constexpr const char* name = "float16";
};
template <>
struct DtypeOf<LowHalf> {
    using Type = LowHalf;
    static constexpr Dtype value = Dtype::INT16;
    static constexpr const char* name = "int16";
};
template <>
struct DtypeOf<Code> {
    using Type = Code;
    static constexpr Dtype value = Dtype::UINT8;
    static constexpr const char* name = "uint8";
};

// What a parameter of type P is computed in: fp64 in fp64, all else in fp32.
template <class P>
using Compute = std::conditional_t<std::is_same_v<P, double>, double, float>;

// A parameter's type in memory, its gradient's and its moments'.
template <class P, class G, class S = Compute<P>>
struct Pattern {
    using Param = P;
    using Grad = G;
    using State = S;
    static constexpr Dtype param = DtypeOf<P>::value, grad = DtypeOf<G>::value, state = DtypeOf<S>::value;
};

// What parameters and gradients may be, and what columns may be.
using Dtypes = List<DtypeOf<float>, DtypeOf<double>, DtypeOf<BFloat16>, DtypeOf<Float16>>;
using ColumnDtypes =
    List<DtypeOf<float>, DtypeOf<double>, DtypeOf<BFloat16>, DtypeOf<Float16>, DtypeOf<LowHalf>, DtypeOf<Code>>;

using Patterns =
    List<Pattern<float, float>, Pattern<double, double>, Pattern<double, float>, Pattern<BFloat16, BFloat16>,
         Pattern<BFloat16, float>, Pattern<Float16, Float16>, Pattern<Float16, float>, Pattern<float, float, BFloat16>,
         Pattern<BFloat16, BFloat16, BFloat16>, Pattern<BFloat16, float, BFloat16>, Pattern<Float16, Float16, BFloat16>,
         Pattern<Float16, float, BFloat16>, Pattern<float, float, Code>, Pattern<BFloat16, BFloat16, Code>,
         Pattern<BFloat16, float, Code>, Pattern<Float16, Float16, Code>, Pattern<Float16, float, Code>>;

}  // namespace lookahead_fused
