// SIMD registers as values: what a rule computes in on a CPU.
//
// Vec is GCC's and Clang's vector extension in a struct, so that rules find their operations by argument lookup, and
// compiles on any architecture. Intrinsics stand only where the extension has no word for the operation (root) or the
// compiler no good translation (fp16); every one of them gives the bits of the generic form beside it.
#pragma once

#include <cstring>
#include <utility>

#include "../rules/numeric.h"
#include "../state/bfloat16.h"
#include "../table/dtypes.h"
#include "../table/master.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lookahead_fused {
inline namespace LF_ISA {

// GCC 12 resolves a vector type that depends on a template's arguments only when it is a member of another template.
template <class T, int N>
struct Register {
    typedef T Type __attribute__((vector_size(N * sizeof(T))));
};

// What `of` makes of the lanes' numbers, as a constant. Of a loop over 32 lanes Clang makes one that runs, wherever
// they are asked for: an int8 step took four times as long.
template <class T, class Of, int... LANE>
LF_HD typename Register<T, sizeof...(LANE)>::Type each_lane(Of of, std::integer_sequence<int, LANE...>) {
    return typename Register<T, sizeof...(LANE)>::Type{static_cast<T>(of(LANE))...};
}
template <class T, int N, class Of>
LF_HD typename Register<T, N>::Type each_lane(Of of) {
    return each_lane<T>(of, std::make_integer_sequence<int, N>{});
}
template <int N>
LF_HD typename Register<uint32_t, N>::Type lane_numbers() {
    return each_lane<uint32_t, N>([](int lane) { return lane; });
}

template <class T, int N>
struct Vec {
    using Native = typename Register<T, N>::Type;
    Native native;

    friend LF_HD Vec operator+(Vec a, Vec b) { return {a.native + b.native}; }
    friend LF_HD Vec operator-(Vec a, Vec b) { return {a.native - b.native}; }
    friend LF_HD Vec operator*(Vec a, Vec b) { return {a.native * b.native}; }
    friend LF_HD Vec operator/(Vec a, Vec b) { return {a.native / b.native}; }
    friend LF_HD Vec operator+(Vec a, T b) { return {a.native + b}; }
    friend LF_HD Vec operator*(Vec a, T b) { return {a.native * b}; }
    friend LF_HD Vec operator*(T a, Vec b) { return {a * b.native}; }

    // The comparison is false for a NaN, which then stays.
    friend LF_HD Vec maximum(Vec a, Vec b) { return {a.native <= b.native ? b.native : a.native}; }

    friend LF_HD Vec sign(Vec a) {
        const Native zero{}, one = zero + T(1);
        return {a.native > zero ? one : a.native < zero ? -one : a.native + zero};
    }

    friend LF_HD Vec square_root(Vec a) {
#if defined(__AVX512F__)
        if constexpr (sizeof(Native) == 64 && sizeof(T) == 4) return {(Native)_mm512_sqrt_ps((__m512)a.native)};
        if constexpr (sizeof(Native) == 64 && sizeof(T) == 8) return {(Native)_mm512_sqrt_pd((__m512d)a.native)};
#endif
#if defined(__AVX__)
        if constexpr (sizeof(Native) == 32 && sizeof(T) == 4) return {(Native)_mm256_sqrt_ps((__m256)a.native)};
        if constexpr (sizeof(Native) == 32 && sizeof(T) == 8) return {(Native)_mm256_sqrt_pd((__m256d)a.native)};
#endif
#if defined(__SSE2__)
        if constexpr (sizeof(Native) == 16 && sizeof(T) == 4) return {(Native)_mm_sqrt_ps((__m128)a.native)};
        if constexpr (sizeof(Native) == 16 && sizeof(T) == 8) return {(Native)_mm_sqrt_pd((__m128d)a.native)};
#endif
        for (int i = 0; i < N; ++i) a.native[i] = square_root(a.native[i]);
        return a;
    }
};

template <class To, class From>
LF_HD To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// Conversions between the 16-bit formats and fp32, a vector at a time. Widening is exact; narrowing rounds once, to
// the nearest, ties to even, subnormal numbers included, as torch and the GPU's conversion instructions do.
template <int N>
struct Convert {
    using Float = Vec<float, N>;
    using Half = typename Register<uint16_t, N>::Type;
    using Word = typename Register<uint32_t, N>::Type;
    using Signed = typename Register<int32_t, N>::Type;
    using Short = typename Register<int16_t, N>::Type;

    static LF_HD Float widen_bfloat16(Half bits) {
        return {bit_cast<typename Float::Native>(__builtin_convertvector(bits, Word) << 16)};
    }

    static LF_HD Half narrow_bfloat16(Float value) {
        const Word bits = bit_cast<Word>(value.native);
        const Word rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Word is_nan = (Word)((bits & 0x7fffffffu) > 0x7f800000u);
        // The NaN that NVIDIA's conversion gives.
        return __builtin_convertvector((is_nan & 0x7fffu) | (~is_nan & rounded), Half);
    }

    static LF_HD Half narrow_without_bias(Float value, Word random) {
        return __builtin_convertvector(rounded_without_bias(bit_cast<Word>(value.native), random), Half);
    }

    static LF_HD Float join_master(Half param, Short low) {
        const Word high = __builtin_convertvector(param, Word);
        return {bit_cast<typename Float::Native>(join_halves(high, (Word) __builtin_convertvector(low, Signed)))};
    }

    static LF_HD void halve_master(Float master, Half& param, Half& low) {
        Word high, rest;
        halve(bit_cast<Word>(master.native), high, rest);
        param = __builtin_convertvector(high, Half);
        low = __builtin_convertvector(rest, Half);
    }

    static LF_HD Float widen_float16(Half bits) {
#if defined(__AVX512F__)
        if constexpr (N == 16) return {(typename Float::Native)_mm512_cvtph_ps((__m256i)bits)};
#endif
#if defined(__F16C__)
        if constexpr (N == 8) return {(typename Float::Native)_mm256_cvtph_ps((__m128i)bits)};
#endif
        const Word half = __builtin_convertvector(bits, Word);
        const Word sign = (half & 0x8000u) << 16;
        const Word magnitude = half & 0x7fffu;
        const Word normal = (magnitude << 13) + (112u << 23);
        const Word special = (magnitude << 13) | 0x7f800000u | ((Word)(magnitude > 0x7c00u) & 0x00400000u);
        // A subnormal half is a small integer times 2^-24, and that product is exact in fp32.
        const auto subnormal = __builtin_convertvector((Signed)magnitude, typename Float::Native) * 0x1p-24f;
        const Word is_special = (Word)(magnitude >= 0x7c00u);
        const Word is_subnormal = (Word)(magnitude < 0x0400u);
        const Word widened = (is_special & special) | (is_subnormal & bit_cast<Word>(subnormal)) |
                             (~is_special & ~is_subnormal & normal);
        return {bit_cast<typename Float::Native>(sign | widened)};
    }

    static LF_HD Half narrow_float16(Float value) {
#if defined(__AVX512F__)
        if constexpr (N == 16) return (Half)_mm512_cvtps_ph((__m512)value.native, _MM_FROUND_TO_NEAREST_INT);
#endif
#if defined(__F16C__)
        if constexpr (N == 8) return (Half)_mm256_cvtps_ph((__m256)value.native, _MM_FROUND_TO_NEAREST_INT);
#endif
        const Word bits = bit_cast<Word>(value.native);
        const Word sign = (bits >> 16) & 0x8000u;
        const Word magnitude = bits & 0x7fffffffu;
        const Word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const Word nan = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
        // Below 2^-14, adding 1/2 leaves in the low bits the multiple of 2^-24 that a subnormal half is, rounded by
        // the addition itself.
        const auto shifted = bit_cast<typename Float::Native>(magnitude) + 0.5f;
        const Word subnormal = bit_cast<Word>(shifted) - 0x3f000000u;
        const Word is_nan = (Word)(magnitude > 0x7f800000u);
        const Word overflows = (Word)(magnitude >= 0x477ff000u);
        const Word is_subnormal = (Word)(magnitude < 0x38800000u);
        const Word finite = (is_subnormal & subnormal) | (~is_subnormal & normal);
        const Word narrowed = (is_nan & nan) | (~is_nan & ((overflows & 0x7c00u) | (~overflows & finite)));
        return __builtin_convertvector(sign | narrowed, Half);
    }
};

// load and store move N elements of a memory type M to and from a register of the compute type T.
template <class T, int N, class M>
struct Memory;

template <class T, int N>
struct Memory<T, N, T> {
    static LF_HD Vec<T, N> load(const T* from) {
        Vec<T, N> value;
        std::memcpy(&value, from, sizeof(value));
        return value;
    }
    static LF_HD void store(T* to, Vec<T, N> value) { std::memcpy(to, &value, sizeof(value)); }
};

template <int N>
struct Memory<double, N, float> {
    static LF_HD Vec<double, N> load(const float* from) {
        typename Vec<float, N>::Native value;
        std::memcpy(&value, from, sizeof(value));
        return {__builtin_convertvector(value, typename Vec<double, N>::Native)};
    }
};

template <int N>
struct Memory<float, N, BFloat16> {
    static LF_HD Vec<float, N> load(const BFloat16* from) {
        typename Convert<N>::Half bits;
        std::memcpy(&bits, from, sizeof(bits));
        return Convert<N>::widen_bfloat16(bits);
    }
    static LF_HD void store(BFloat16* to, Vec<float, N> value) {
        const auto bits = Convert<N>::narrow_bfloat16(value);
        std::memcpy(to, &bits, sizeof(bits));
    }
};

template <int N>
struct Memory<float, N, Float16> {
    static LF_HD Vec<float, N> load(const Float16* from) {
        typename Convert<N>::Half bits;
        std::memcpy(&bits, from, sizeof(bits));
        return Convert<N>::widen_float16(bits);
    }
    static LF_HD void store(Float16* to, Vec<float, N> value) {
        const auto bits = Convert<N>::narrow_float16(value);
        std::memcpy(to, &bits, sizeof(bits));
    }
};

// How N elements of a row's moments go to memory, where they are of type S: `first` is the place of the first element,
// with the row's key.
template <class T, int N, class S>
struct MomentMemory {
    explicit LF_HD MomentMemory(uint32_t) {}
    LF_HD void store(S* to, Vec<T, N> value, int) const { Memory<T, N, S>::store(to, value); }
};

template <int N>
struct MomentMemory<float, N, BFloat16> {
    typename Convert<N>::Word random;

    explicit LF_HD MomentMemory(uint32_t first) { random = mixed(lane_numbers<N>() + first); }
    LF_HD void store(BFloat16* to, Vec<float, N> value, int moment) const {
        const auto bits = Convert<N>::narrow_without_bias(value, random_half(random, moment));
        std::memcpy(to, &bits, sizeof(bits));
    }
};

// How parameters that have a master come and go, whole or halved.
template <class T, int N, class P>
struct MasterMemory {
    static LF_HD Vec<T, N> load(const P*, const T* master) { return Memory<T, N, T>::load(master); }
    static LF_HD void store(P* param, T* master, Vec<T, N> value) {
        Memory<T, N, T>::store(master, value);
        Memory<T, N, P>::store(param, value);
    }
};

template <int N>
struct MasterMemory<float, N, BFloat16> {
    static LF_HD Vec<float, N> load(const BFloat16* param, const LowHalf* master) {
        typename Convert<N>::Half high;
        typename Convert<N>::Short low;
        std::memcpy(&high, param, sizeof(high));
        std::memcpy(&low, master, sizeof(low));
        return Convert<N>::join_master(high, low);
    }
    static LF_HD void store(BFloat16* param, LowHalf* master, Vec<float, N> value) {
        typename Convert<N>::Half high, low;
        Convert<N>::halve_master(value, high, low);
        std::memcpy(param, &high, sizeof(high));
        std::memcpy(master, &low, sizeof(low));
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
