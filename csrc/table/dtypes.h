// The types of elements: what a parameter and its gradient may be, and what they are computed in. One list of types
// and one of pairs, from which every walk is instantiated and every kernel named.
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

enum class Dtype : int32_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16, INT16 };

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

// A parameter's type in memory and its gradient's.
template <class P, class G>
struct Pattern {
    using Param = P;
    using Grad = G;
    static constexpr Dtype param = DtypeOf<P>::value, grad = DtypeOf<G>::value;
};

// What parameters and gradients may be, and what columns may be.
using Dtypes = List<DtypeOf<float>, DtypeOf<double>, DtypeOf<BFloat16>, DtypeOf<Float16>>;
using ColumnDtypes = List<DtypeOf<float>, DtypeOf<double>, DtypeOf<BFloat16>, DtypeOf<Float16>, DtypeOf<LowHalf>>;

using Patterns =
    List<Pattern<float, float>, Pattern<double, double>, Pattern<double, float>, Pattern<BFloat16, BFloat16>,
         Pattern<BFloat16, float>, Pattern<Float16, Float16>, Pattern<Float16, float>>;

// What a parameter of type P is computed in: fp64 in fp64, all else in fp32.
template <class P>
using Compute = std::conditional_t<std::is_same_v<P, double>, double, float>;

}  // namespace lookahead_fused
