// What a master is, and what is kept of it: a parameter in the compute type, in which its updates accumulate.
//
// Of an fp16 parameter the whole. Of a bf16 one the low half of the fp32 number's bits: the parameter is the number
// rounded to the nearest, and where it lies exactly between two, the one away from zero. So what the low half, read as
// a signed number, adds to the parameter's bits as the high half are the master's bits again. Of 65,537 fp32 numbers
// that one bf16 number is the nearest of, ties included, that leaves one to its neighbour, and 16 bits tell the others
// apart.
//
//   zeros and subnormal numbers are as any other; the low half keeps what is left of a parameter that is a zero
//   finite numbers that round to an infinity are kept: the parameter is infinite, its master is not
//   infinities have a low half of 0
//   NaN is one NaN, with a low half of 0
#pragma once

#include <cstdint>
#include <type_traits>

#include "../rules/numeric.h"
#include "dtypes.h"

namespace lookahead_fused {

template <class P>
using Master = std::conditional_t<std::is_same_v<P, BFloat16>, LowHalf, Compute<P>>;

template <class P>
constexpr bool MASTER_IS_HALVED = std::is_same_v<Master<P>, LowHalf>;

inline namespace LF_ISA {

// Word is a uint32_t or a SIMD vector of them.

template <class Word>
LF_HD auto is_nan_bits(Word bits) {
    return (bits & 0x7fffffffu) > 0x7f800000u;
}

// A master's bits from a parameter's, and its low half's with their sign extended.
//
// A parameter may have been changed by others beside a low half that is not its own. The master is then within the
// rounding of what it was changed to: it rounds to the parameter. Only beside a zero or an infinity a low half may lead
// to where no number is (from +0 down to the bits of a NaN), and there counts as 0.
template <class Word>
LF_HD Word join_halves(Word param, Word low) {
    const Word alone = param << 16, both = alone + low;
    return is_nan_bits(both) ? alone : both;
}

// Of `low` the lowest 16 bits are the low half.
template <class Word>
LF_HD void halve(Word master, Word& param, Word& low) {
    // The NaN that NVIDIA's conversion gives. Any other might, rounded, be an infinity, or carry into the sign.
    const Word nan = Word{} + 0x7fff0000u;
    low = is_nan_bits(master) ? nan : master;
    param = (low + 0x8000u) >> 16;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
