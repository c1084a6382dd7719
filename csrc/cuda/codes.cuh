// Codes of 8 bits (state/int8.h) in a warp's registers: four of them in a word of a lane, a block in a warp.
//
// Here stands in fewer instructions what int8.h says: in a step over fp32 the kernels have some 140 for each element,
// by what an H100 issues while it moves its bytes.
#pragma once

#include <cstdint>
#include <cstring>

#include "../state/int8.h"
#include "memory.cuh"
#include "runtime.h"

namespace lookahead_fused {
inline namespace LF_ISA {

constexpr int WARP = 32, CODES_OF_LANE = CODE_BLOCK / WARP;

using FourCodes = Pack<Code, CODES_OF_LANE>;
using FourFloats = Pack<float, CODES_OF_LANE>;

// scale: its bits. A code is brought to where its bits are in the number, and all of its word are told from the offset
// by one addition.
template <class Kind>
__device__ __forceinline__ FourFloats decoded_block(const FourCodes& codes, uint32_t scale) {
    constexpr uint32_t MAGNITUDE = (0xffu ^ Kind::SIGN) << Kind::SHIFT;
    uint32_t word, bits[CODES_OF_LANE];
    std::memcpy(&word, &codes, sizeof(word));
    const uint32_t offset = Kind::scale_bits(Kind::top_in(scale)) - Kind::scale_bits(Kind::TOP);
#pragma unroll
    for (int j = 0; j < CODES_OF_LANE; ++j) {
        const int up = Kind::SHIFT - 8 * j;
        const uint32_t magnitude = (up > 0 ? word << up : word >> -up) & MAGNITUDE;
        bits[j] = magnitude == 0 ? 0 : magnitude + offset;
        if (magnitude == Kind::NOT_FINITE << Kind::SHIFT) bits[j] = 0x7fff0000u;
        bits[j] |= word << (24 - 8 * j) & Kind::SIGN << 24;
    }
    FourFloats numbers;
    std::memcpy(&numbers, bits, sizeof(bits));
    return numbers;
}

// Encodes a block; returns the bits of its scale. All lanes of the warp come here together.
template <class Kind>
__device__ __forceinline__ uint32_t encode_block(const FourFloats& numbers, const uint32_t (&random)[CODES_OF_LANE],
                                                 int moment, FourCodes& codes) {
    uint32_t bits[CODES_OF_LANE], magnitude[CODES_OF_LANE], largest = 0, least = 0xffffffffu;
    std::memcpy(bits, &numbers, sizeof(bits));
#pragma unroll
    for (int j = 0; j < CODES_OF_LANE; ++j) {
        magnitude[j] = bits[j] & 0x7fffffffu;
        largest = largest < magnitude[j] ? magnitude[j] : largest;
        least = magnitude[j] < least ? magnitude[j] : least;
    }
    largest = largest_in_warp(largest);
    if (largest >= Kind::LARGEST) {
        // Some of them are not finite, or not to be rounded up.
        uint32_t finite = 0;
        for (int j = 0; j < CODES_OF_LANE; ++j) {
            const uint32_t own = Kind::magnitude(bits[j]);
            finite = finite < own ? own : finite;
        }
        const uint32_t top = Kind::top_of(largest_in_warp(finite));
        for (int j = 0; j < CODES_OF_LANE; ++j) {
            codes.element[j].bits = static_cast<uint8_t>(Kind::encoded(bits[j], random_half(random[j], moment), top));
        }
        return Kind::scale_bits(top);
    }
    const uint32_t top = Kind::top_of(largest), offset = Kind::scale_bits(top - Kind::TOP);
    int32_t code[CODES_OF_LANE];
#pragma unroll
    for (int j = 0; j < CODES_OF_LANE; ++j) {
        const uint32_t up = magnitude[j] + (random_half(random[j], moment) << (Kind::SHIFT - 16));
        code[j] = static_cast<int32_t>(up - offset) >> Kind::SHIFT;
        // Below the least number a square becomes that; what is 0 stays.
        const int32_t one = magnitude[j] < 1 ? 0 : 1;
        if (Kind::SIGN == 0) code[j] = code[j] < one ? one : code[j];
    }
    if (Kind::SIGN != 0 && any_in_warp(least < offset + Kind::scale_bits(1))) {
        for (int j = 0; j < CODES_OF_LANE; ++j) {
            code[j] = static_cast<int32_t>(Kind::encoded(magnitude[j], random_half(random[j], moment), top));
        }
    }
    FourCodes sign;
#pragma unroll
    for (int j = 0; j < CODES_OF_LANE; ++j) {
        codes.element[j].bits = static_cast<uint8_t>(code[j]);
        sign.element[j].bits = static_cast<uint8_t>(bits[j] >> 24);
    }
    if (Kind::SIGN != 0) {
        uint32_t word, signs;
        std::memcpy(&word, &codes, sizeof(word));
        std::memcpy(&signs, &sign, sizeof(signs));
        word |= signs & (Kind::SIGN * 0x01010101u);
        std::memcpy(&codes, &word, sizeof(word));
    }
    return Kind::scale_bits(top);
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
