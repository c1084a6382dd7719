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
// Word is a uint32_t or a SIMD vector of them, and Half a uint16_t or a vector of those, where the upper half of a word
// tells all: what a code stands for is a bf16 number.
#pragma once

#include <cstdint>
#include <cstring>

#include "../rules/numeric.h"

namespace lookahead_fused {

constexpr int CODE_BLOCK = 128;

constexpr int64_t code_blocks(int64_t numel) { return (numel + CODE_BLOCK - 1) / CODE_BLOCK; }

inline namespace LF_ISA {

// What else words are read as; code_vectors.h has it for SIMD vectors.
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

    // The bits of the bf16 numbers that codes stand for.
    template <class Half>
    static LF_HD Half decoded(Half code, uint32_t top) {
        const Half zero{}, not_finite = zero + static_cast<uint16_t>(0x7fff);
        const Half magnitude = SIGN == 0 ? code : Half(code & MAGNITUDE);
        const Half number = (magnitude + static_cast<uint16_t>(top - TOP)) << (SHIFT - 16);
        const Half bits = magnitude == static_cast<uint16_t>(NOT_FINITE) ? not_finite : number;
        return (magnitude == static_cast<uint16_t>(0) ? zero : bits) | (code & SIGN_BIT) << 8;
    }

    // The number that the code 1 stands for.
    static LF_HD uint32_t least_bits(uint32_t top) { return (top - TOP + 1) << SHIFT; }

    // A number's bits and 16 random ones: the sum's upper bits are those of the number that it is rounded to.
    template <class Word>
    static LF_HD Word rounded(Word bits, Word random) {
        return bits + (random << (SHIFT - 16));
    }

    // The codes by the upper halves of rounded bits, in a block whose `measured` bits are all from least_bits to below
    // LARGEST. Most blocks are such, and this is less than half of the instructions of `encoded`.
    template <class Half>
    static LF_HD Half code_of(Half upper, uint32_t top) {
        const Half magnitude = (upper >> (SHIFT - 16)) - static_cast<uint16_t>(top - TOP);
        return SIGN == 0 ? magnitude : Half((magnitude & MAGNITUDE) | (upper >> 8 & SIGN_BIT));
    }

    // No square has a sign but a NaN, which as a negative number is less than the least.
    template <class Word>
    static LF_HD typename Reading<Word>::Signed measured(Word bits) {
        return (typename Reading<Word>::Signed)(SIGN == 0 ? bits : bits & 0x7fffffffu);
    }

    // The codes of fp32 numbers' bits, with 16 random bits for each (random_half), in a block with this top.
    template <class Word>
    static LF_HD Word encoded(Word bits, Word random, uint32_t top) {
        using Read = Reading<Word>;
        using Signed = typename Read::Signed;
        const Word magnitude = bits & 0x7fffffffu, none{}, one = none + 1u, not_finite = none + NOT_FINITE;
        const uint32_t least = least_bits(top);
        const Word up = (Signed)magnitude < (int32_t)LARGEST ? rounded(magnitude, random) : magnitude;
        Word code = (up >> SHIFT) - (top - TOP);
        // Below the least number: upwards as often as the number is near to it, or in any case.
        const auto is_less = (Signed)magnitude < (int32_t)least;
        if constexpr (SQUARES) {
            code = is_less ? one : code;
            code = magnitude == 0u ? none : code;
        } else {
            const float step = Reading<uint32_t>::with_bits(least) * 0x1p-16f;
            const Word drawn = Read::number(random) * step < Read::with_bits(magnitude) ? one : none;
            code = is_less ? drawn : code;
        }
        return ((Signed)magnitude < 0x7f800000 ? code : not_finite) | (bits >> 24 & SIGN);
    }

   private:
    static constexpr uint16_t SIGN_BIT = SIGN, MAGNITUDE = 0xff ^ SIGN;
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
