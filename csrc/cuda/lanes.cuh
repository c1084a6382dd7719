// What a warp's lanes have of a block of codes (state/int8.h), and how it comes out of memory and goes back.
#pragma once

#include <cstdint>
#include <type_traits>

#include "codes.cuh"
#include "memory.cuh"

namespace lookahead_fused {
inline namespace LF_ISA {

// What the walk of a chunk has to do, a bit each: in one word, since predicates for all of them would take more
// registers than there are. FIRST_MOMENT is the first of a bit for each moment that its row has.
struct Has {
    enum : uint32_t {
        FIRST_MOMENT = 1,
        CACHED = 8,  // the first moment's copy, which becomes what that is
        WITH_COMPANION = 16,
        LOW_HALVES = 32,  // beside bf16 parameters
        WHOLE = 64,       // weights in fp32, alone or beside fp16 parameters
        ALIGNED = 128,
        EVENT = 256,
        EVENT_OF_MOMENT = 512,
        CAPTURE = 1024,
        WEIGHTS = 2048,  // an event changes them
    };
};

// What a lane has of a block: where the block is whole and the arrays are aligned, neighbours, in one access to each
// array; else every 32nd element, as far as there are any.
struct Lane {
    int block, first;  // in the chunk
    int end;           // of the chunk's elements
    uint32_t has;      // ALIGNED where the elements lie together

    __device__ __forceinline__ bool together() const { return (has & Has::ALIGNED) != 0; }
    __device__ __forceinline__ bool holds(int j) const { return first + j * WARP < end; }
    __device__ __forceinline__ int place(int j) const { return first + (together() ? j : j * WARP); }
};

__device__ __forceinline__ Lane lane_of(uint32_t has, int begin, int end) {
    const int lane = static_cast<int>(threadIdx.x % WARP);
    const bool together = (has & Has::ALIGNED) != 0 && end - begin >= CODE_BLOCK;
    return {static_cast<int>(static_cast<unsigned>(begin) / CODE_BLOCK),
            begin + (together ? lane * CODES_OF_LANE : lane), end, together ? has : has & ~uint32_t{Has::ALIGNED}};
}

// Calls visit(whether the lane's elements lie together, as a type).
template <class Visit>
__device__ __forceinline__ void by_place(const Lane& lane, Visit visit) {
    if (lane.together()) {
        visit(std::true_type{});
    } else {
        visit(std::false_type{});
    }
}

template <Reuse REUSE, class M, class Together>
__device__ __forceinline__ void take(Together, const Lane& lane, Pack<M, CODES_OF_LANE>& to, const void* from) {
    const M* const first = static_cast<const M*>(from) + lane.first;
    if constexpr (Together::value) {
        load<REUSE>(to, first);
    } else {
        to = {};
#pragma unroll
        for (int j = 0; j < CODES_OF_LANE; ++j) {
            if (!lane.holds(j)) continue;
            Pack<M, 1> one;
            load<REUSE>(one, first + j * WARP);
            to.element[j] = one.element[0];
        }
    }
}

template <Reuse REUSE, class M, class Together>
__device__ __forceinline__ void put(Together, const Lane& lane, void* to, const Pack<M, CODES_OF_LANE>& from) {
    M* const first = static_cast<M*>(to) + lane.first;
    if constexpr (Together::value) {
        store<REUSE>(first, from);
    } else {
#pragma unroll
        for (int j = 0; j < CODES_OF_LANE; ++j) {
            if (lane.holds(j)) store<REUSE>(first + j * WARP, Pack<M, 1>{{from.element[j]}});
        }
    }
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
