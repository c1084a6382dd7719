// Moments that lie in memory as codes of 8 bits, a quarter of what fp32 takes, and how they are rounded to them.
//
// A row is cut into blocks of CODE_BLOCK elements, the last of which may be shorter. A code is a floating-point number
// of few bits whose exponent counts down from the largest in its block: its magnitude is the upper bits of an fp32
// number, less an offset that the block's elements share. So to encode and to decode are integer operations on bits,
// exact, and the same on every backend. The block's scale is the fp32 number that the largest code stands for; its
// upper bits are `top` here.
//
// There are two kinds. First moments have a sign, 7 bits of magnitude and 16 octaves below the largest, and what is
// smaller than the least of them becomes that or 0, at random. Squares have no sign, 8 bits and 32 octaves, and what is
// not 0 does not become 0: a second moment of 0 would make a huge step.
//
// Between two codes a number is rounded as it is to bf16 (bfloat16.h): without bias, by the same draw.
//
// Word is a uint32_t or a SIMD vector of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../rules/numeric.h"

namespace lookahead_fused {

constexpr int CODE_BLOCK = 128;

constexpr int64_t code_blocks(int64_t numel) { return (numel + CODE_BLOCK - 1) / CODE_BLOCK; }

inline namespace LF_ISA {

// What else words are read as; vector.h has it for SIMD vectors.
template <class Word>
struct Reading;

template <>
struct Reading<uint32_t> {
    using Signed = int32_t;
    static LF_HD float number(uint32_t word) { return static_cast<float>(word); }
    static LF_HD float with_bits(uint32_t bits) {
        float number;
        memcpy(&number, &bits, sizeof(number));
        return number;
    }
};

// How the moments of a kind are kept.
template <bool SQUARES>
struct Codes {
    // How many of an fp32 number's lower bits a code lacks: 3 bits of its mantissa are left.
    static constexpr int SHIFT = 20;
    // Of magnitudes: the largest number's, and that of all that is infinite or NaN.
    static constexpr uint32_t TOP = SQUARES ? 254 : 126, NOT_FINITE = TOP + 1;
    static constexpr uint32_t SIGN = SQUARES ? 0 : 0x80;
    // No top is smaller: the least number of a block is then 2^-107 or more, and what it is multiplied by is exact.
    static constexpr uint32_t FIRST_TOP = TOP + (20u << (23 - SHIFT));
    // The largest finite number that a code can stand for. From it on, nothing is rounded up.
    static constexpr uint32_t LARGEST_TOP = (0x7f800000u >> SHIFT) - 1, LARGEST = LARGEST_TOP << SHIFT;

    // Of an fp32 number's bits what a block's largest is found by: what is not finite has no part in it.
    template <class Word>
    static LF_HD Word magnitude(Word bits) {
        using Signed = typename Reading<Word>::Signed;
        const Word magnitude = bits & 0x7fffffffu;
        return (Signed)magnitude < 0x7f800000 ? magnitude : Word{};
    }

    // Of a block whose largest magnitude this is. One more than its own, which it may be rounded up to.
    static LF_HD uint32_t top_of(uint32_t largest) {
        const uint32_t top = (largest >> SHIFT) + 1;
        return top > LARGEST_TOP ? LARGEST_TOP : top < FIRST_TOP ? FIRST_TOP : top;
    }

    // From a scale's bits and to them. Any bits will do: a scale that is not one makes numbers that mean nothing.
    static LF_HD uint32_t top_in(uint32_t scale_bits) { return scale_bits >> SHIFT; }
    static LF_HD uint32_t scale_bits(uint32_t top) { return top << SHIFT; }

    // The fp32 numbers' bits that codes stand for, each in the lower 8 bits of a word, the others 0.
    template <class Word>
    static LF_HD Word decoded(Word code, uint32_t top) {
        const Word zero{}, not_finite = zero + 0x7fff0000u;
        const Word magnitude = code & (0xffu ^ SIGN);
        const Word number = (magnitude + (top - TOP)) << SHIFT;
        const Word bits = magnitude == NOT_FINITE ? not_finite : number;
        return (magnitude == 0u ? zero : bits) | (code & SIGN) << 24;
    }

    // The codes of fp32 numbers' bits, with 16 random bits for each (random_half), in a block with this top.
    template <class Word>
    static LF_HD Word encoded(Word bits, Word random, uint32_t top) {
        using Read = Reading<Word>;
        using Signed = typename Read::Signed;
        const Word magnitude = bits & 0x7fffffffu, none{}, one = none + 1u, not_finite = none + NOT_FINITE;
        const uint32_t offset = top - TOP, least_bits = (offset + 1) << SHIFT;
        const Word up = (Signed)magnitude < (int32_t)LARGEST ? magnitude + (random << (SHIFT - 16)) : magnitude;
        Word code = (up >> SHIFT) - offset;
        // Below the least number: upwards as often as the number is near to it, or in any case.
        const auto is_less = (Signed)magnitude < (int32_t)least_bits;
        if constexpr (SQUARES) {
            code = is_less ? one : code;
            code = magnitude == 0u ? none : code;
        } else {
            const float step = Reading<uint32_t>::with_bits(least_bits) * 0x1p-16f;
            const Word drawn = Read::number(random) * step < Read::with_bits(magnitude) ? one : none;
            code = is_less ? drawn : code;
        }
        return ((Signed)magnitude < 0x7f800000 ? code : not_finite) | (bits >> 24 & SIGN);
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
