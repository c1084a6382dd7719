// SIMD registers of 8-bit codes, and of what they stand for: see ../state/int8.h, whose Half is a register of 16-bit
// words here and whose Word one of 32-bit words.
//
// The intrinsics are those that GCC does not find in the generic form beside them; they give the same bits.
#pragma once

#include "../state/int8.h"
#include "vector.h"

namespace lookahead_fused {
inline namespace LF_ISA {

// What words of a SIMD vector are read as: see int8.h.
template <class Word>
struct Reading {
    static constexpr int N = sizeof(Word) / sizeof(uint32_t);
    using Signed = typename Register<int32_t, N>::Type;
    using Float = typename Register<float, N>::Type;
    // Of numbers below 2^31.
    static LF_HD Float number(Word word) { return __builtin_convertvector((Signed)word, Float); }
    static LF_HD Float with_bits(Word bits) { return (Float)bits; }
};

// Codes in registers of N words. Between the widths GCC would convert them one by one.
template <int N>
struct CodeVectors {
    using Word = typename Register<uint32_t, N>::Type;
    using Signed = typename Register<int32_t, N>::Type;
    using Half = typename Register<uint16_t, 2 * N>::Type;
    using Byte = typename Register<uint8_t, 2 * N>::Type;

    // The codes of two registers of words.
    static LF_HD Half load(const Code* from) {
#if defined(__AVX512BW__)
        if constexpr (N == 16) return (Half)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) return (Half)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
#endif
#if defined(__SSE2__)
        if constexpr (N == 4) {
            return (Half)_mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)from), _mm_setzero_si128());
        }
#endif
        Byte bytes;
        std::memcpy(&bytes, from, sizeof(bytes));
        return __builtin_convertvector(bytes, Half);
    }

    // Words with these upper halves, and with none lower.
    static LF_HD void raise(Half halves, Word& first, Word& second) {
#if defined(__AVX512BW__)
        if constexpr (N == 16) {
            const auto place = each_lane<uint16_t, 2 * N>([](int lane) { return lane / 2; });
            const __m512i low = (__m512i)place, high = (__m512i)(place + static_cast<uint16_t>(N));
            first = (Word)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, low, (__m512i)halves);
            second = (Word)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, high, (__m512i)halves);
            return;
        }
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) {
            const __m256i none = _mm256_setzero_si256(), lanes = _mm256_permute4x64_epi64((__m256i)halves, 0xd8);
            first = (Word)_mm256_unpacklo_epi16(none, lanes);
            second = (Word)_mm256_unpackhi_epi16(none, lanes);
            return;
        }
#endif
#if defined(__SSE2__)
        if constexpr (N == 4) {
            first = (Word)_mm_unpacklo_epi16(_mm_setzero_si128(), (__m128i)halves);
            second = (Word)_mm_unpackhi_epi16(_mm_setzero_si128(), (__m128i)halves);
            return;
        }
#endif
        for (int i = 0; i < N; ++i) {
            first[i] = static_cast<uint32_t>(halves[i]) << 16;
            second[i] = static_cast<uint32_t>(halves[N + i]) << 16;
        }
    }

    // The words' upper halves.
    static LF_HD Half upper(Word first, Word second) {
#if defined(__AVX512BW__)
        if constexpr (N == 16) {
            const auto odd = each_lane<uint16_t, 2 * N>([](int lane) { return 2 * lane + 1; });
            return (Half)_mm512_permutex2var_epi16((__m512i)first, (__m512i)odd, (__m512i)second);
        }
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) {
            const __m256i both = _mm256_packus_epi32((__m256i)(first >> 16), (__m256i)(second >> 16));
            return (Half)_mm256_permute4x64_epi64(both, 0xd8);
        }
#endif
#if defined(__SSE2__)
        if constexpr (N == 4) {
            return (Half)_mm_packs_epi32(_mm_srai_epi32((__m128i)first, 16), _mm_srai_epi32((__m128i)second, 16));
        }
#endif
        Half halves;
        for (int i = 0; i < N; ++i) {
            halves[i] = first[i] >> 16;
            halves[N + i] = second[i] >> 16;
        }
        return halves;
    }

    // Of halves that are bytes' values.
    static LF_HD void store(Code* to, Half first, Half second) {
#if defined(__AVX512BW__)
        if constexpr (N == 16) {
            const __m512i both = _mm512_packus_epi16((__m512i)first, (__m512i)second);
            const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
            _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, both));
            return;
        }
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) {
            const __m256i both = _mm256_packus_epi16((__m256i)first, (__m256i)second);
            _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(both, 0xd8));
            return;
        }
#endif
#if defined(__SSE2__)
        if constexpr (N == 4) {
            _mm_storeu_si128((__m128i*)to, _mm_packus_epi16((__m128i)first, (__m128i)second));
            return;
        }
#endif
        const Byte bytes[] = {__builtin_convertvector(first, Byte), __builtin_convertvector(second, Byte)};
        std::memcpy(to, bytes, sizeof(bytes));
    }

    // Lane by lane, which GCC compares and blends.
    static LF_HD Signed larger(Signed a, Signed b) {
#if defined(__AVX512F__)
        if constexpr (N == 16) return (Signed)_mm512_max_epi32((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) return (Signed)_mm256_max_epi32((__m256i)a, (__m256i)b);
#endif
        return a > b ? a : b;
    }
    static LF_HD Signed smaller(Signed a, Signed b) {
#if defined(__AVX512F__)
        if constexpr (N == 16) return (Signed)_mm512_min_epi32((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) return (Signed)_mm256_min_epi32((__m256i)a, (__m256i)b);
#endif
        return a < b ? a : b;
    }

    // Of all lanes, none of them negative. As unsigned numbers: else GCC takes them one by one.
    static LF_HD uint32_t largest(Signed of) {
        const Word words = (Word)of;
        uint32_t all = 0;
        for (int i = 0; i < N; ++i) all = words[i] > all ? words[i] : all;
        return all;
    }
    static LF_HD bool any_below(Signed of, int32_t limit) {
        const Signed below = of < limit;
#if defined(__AVX512F__)
        if constexpr (N == 16) return _mm512_cmplt_epi32_mask((__m512i)of, _mm512_set1_epi32(limit)) != 0;
#endif
#if defined(__AVX2__)
        if constexpr (N == 8) return _mm256_movemask_epi8((__m256i)below) != 0;
#endif
#if defined(__SSE2__)
        if constexpr (N == 4) return _mm_movemask_epi8((__m128i)below) != 0;
#endif
        int32_t any = 0;
        for (int i = 0; i < N; ++i) any |= below[i];
        return any != 0;
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
