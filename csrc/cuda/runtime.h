// The CUDA runtime, and the few instructions that it has no word for, or only in a header (cuda_fp16.h) that takes
// longer to compile than all of the kernels. Tests put a stand-in here, which runs the same sources on the host.
#pragma once

#if defined(LOOKAHEAD_FUSED_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)
// LDG and STG without a hint; __ldca and __stwb ask for a coherence that nobody needs.
template <class Word>
__device__ __forceinline__ Word load_global(const Word* address) {
    __builtin_assume(__isGlobal(address));
    return *address;
}

template <class Word>
__device__ __forceinline__ void store_global(Word* address, Word word) {
    __builtin_assume(__isGlobal(address));
    *address = word;
}

// What the lane beside this one (0 and 1, 2 and 3, ...) gives; all lanes of a warp come here together.
__device__ __forceinline__ uint2 from_neighbour(uint2 given) {
    return make_uint2(__shfl_xor_sync(0xffffffffu, given.x, 1), __shfl_xor_sync(0xffffffffu, given.y, 1));
}

// What a warp's first lane gives: known to be the same in all, so that branches by it are taken by a warp together.
__device__ __forceinline__ uint32_t from_first_lane(uint32_t given) { return __shfl_sync(0xffffffffu, given, 0); }

// The largest that any lane of a warp gives; all of them come here together.
__device__ __forceinline__ uint32_t largest_in_warp(uint32_t own) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, own);
#else
    // The oldest architecture has no instruction for it.
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const uint32_t other = __shfl_xor_sync(0xffffffffu, own, lanes);
        own = own < other ? other : own;
    }
    return own;
#endif
}

__device__ __forceinline__ bool any_in_warp(bool own) { return __any_sync(0xffffffffu, own); }

__device__ __forceinline__ float half_bits_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16_t float_to_half_bits(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Every NaN becomes 0x7fff, on either way.
__device__ __forceinline__ uint16_t float_to_bfloat16_bits(float value) {
#if __CUDA_ARCH__ >= 800
    uint16_t rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
    return rounded;
#else
    // The oldest architecture has no instruction for it.
    const uint32_t bits = __float_as_uint(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(is_nan ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
#endif
#endif
