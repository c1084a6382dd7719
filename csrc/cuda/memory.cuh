// How elements travel between global memory and the registers that a rule computes in.
//
// A row's addresses come out of the table, so the compiler takes them for generic ones: `*address` would be LD and ST,
// which look up the address space in every access; all below are LDG and STG. A gradient, a moment and phi are not
// looked at again before the next step, and go first when the cache is full (`cs`); parameters are, by the next forward
// pass.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../rules/numeric.h"
#include "../state/bfloat16.h"
#include "../table/dtypes.h"
#include "../table/master.h"
#include "runtime.h"

namespace lookahead_fused {
inline namespace LF_ISA {

enum class Reuse { SOON, NEXT_STEP };

template <int BYTES>
struct WordOf;
template <>
struct WordOf<1> {
    using Type = unsigned char;
};
template <>
struct WordOf<2> {
    using Type = unsigned short;
};
template <>
struct WordOf<4> {
    using Type = unsigned int;
};
template <>
struct WordOf<8> {
    using Type = uint2;
};
template <>
struct WordOf<16> {
    using Type = uint4;
};

// N elements that are moved together, in words of 16 bytes or in one smaller one.
template <class M, int N>
struct Pack {
    static constexpr int BYTES = N * sizeof(M);
    static constexpr int WORDS = BYTES > 16 ? BYTES / 16 : 1;
    using Word = typename WordOf<BYTES / WORDS>::Type;
    M element[N];
};

__device__ __forceinline__ float widen(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float widened;
    std::memcpy(&widened, &bits, sizeof(widened));
    return widened;
}

// Rounded to the nearest, ties to even; the bits are the CPU's, NaN included.
__device__ __forceinline__ void narrow(float value, BFloat16& to) { to.bits = float_to_bfloat16_bits(value); }

__device__ __forceinline__ void narrow_without_bias(float value, uint32_t random, BFloat16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    to.bits = static_cast<uint16_t>(rounded_without_bias(bits, random));
}

__device__ __forceinline__ float widen(Float16 value) { return half_bits_to_float(value.bits); }

__device__ __forceinline__ void narrow(float value, Float16& to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    // The instruction gives one NaN for all; x86 keeps sign and payload.
    const uint32_t nan = ((bits >> 16) & 0x8000u) | 0x7e00u | ((bits >> 13) & 0x03ffu);
    to.bits = is_nan ? static_cast<uint16_t>(nan) : float_to_half_bits(value);
}

// A bf16 parameter's master, from and to its two halves.
__device__ __forceinline__ float join(BFloat16 param, LowHalf low) {
    const uint32_t bits = join_halves<uint32_t>(param.bits, static_cast<int32_t>(low.bits));
    float master;
    std::memcpy(&master, &bits, sizeof(master));
    return master;
}

__device__ __forceinline__ void halve(float master, BFloat16& param, LowHalf& low) {
    uint32_t bits, high, rest;
    std::memcpy(&bits, &master, sizeof(bits));
    halve(bits, high, rest);
    param.bits = static_cast<uint16_t>(high);
    low.bits = static_cast<int16_t>(rest);
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }

template <Reuse REUSE, class M, int N>
__device__ __forceinline__ void load(Pack<M, N>& to, const M* from) {
    using Word = typename Pack<M, N>::Word;
    Word word[Pack<M, N>::WORDS];
    const Word* address = reinterpret_cast<const Word*>(from);
#pragma unroll
    for (int i = 0; i < Pack<M, N>::WORDS; ++i) {
        word[i] = REUSE == Reuse::SOON ? load_global(address + i) : __ldcs(address + i);
    }
    std::memcpy(&to, word, sizeof(to));
}

template <Reuse REUSE, class M, int N>
__device__ __forceinline__ void store(M* to, const Pack<M, N>& from) {
    using Word = typename Pack<M, N>::Word;
    Word word[Pack<M, N>::WORDS];
    std::memcpy(word, &from, sizeof(from));
    Word* address = reinterpret_cast<Word*>(to);
#pragma unroll
    for (int i = 0; i < Pack<M, N>::WORDS; ++i) {
        if constexpr (REUSE == Reuse::SOON) {
            store_global(address + i, word[i]);
        } else {
            __stcs(address + i, word[i]);
        }
    }
}

// Two lanes, an even one and the odd one after it, hold 16 bytes each: of the four halves in memory's order the even
// one has 0 and 1, the odd one 2 and 3. Afterwards the even one has 0 and 2, the odd one 1 and 3; and the same call
// takes that back.
template <class M, int N>
__device__ __forceinline__ void trade_halves(Pack<M, N>& pack) {
    static_assert(sizeof(pack) == 2 * sizeof(uint2), "one access of a thread");
    uint2 half[2];
    std::memcpy(half, &pack, sizeof(pack));
    const bool odd = threadIdx.x % 2 != 0;
    const uint2 received = from_neighbour(odd ? half[0] : half[1]);
    half[0] = odd ? received : half[0];
    half[1] = odd ? half[1] : received;
    std::memcpy(&pack, half, sizeof(pack));
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
