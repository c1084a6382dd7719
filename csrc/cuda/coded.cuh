// The walk over rows whose moments lie in codes (state/int8.h): a warp for each block of them.
//
// A block's scale depends on all of its moments, and is known when all are computed. So a warp holds a whole block in
// its registers, four elements a lane, and finds the largest among its lanes: memory is read once and written once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../table/prologue.h"
#include "coded_memory.cuh"
#include "codes.cuh"
#include "kernels.h"
#include "lanes.cuh"
#include "memory.cuh"
#include "runtime.h"

namespace lookahead_fused {
inline namespace LF_ISA {

template <class Rule>
struct CodedWalk : CodedMemory<Rule> {
    using Memory = CodedMemory<Rule>;
    using typename Memory::Arrays;
    using typename Memory::Floats;
    using typename Memory::Moment;
    using typename Memory::Raw;
    using typename Memory::Step;
    static constexpr int MOMENTS = Memory::MOMENTS, N = Memory::N;

    // A bit for each moment: on a GPU there is no array of the rule's to look into.
    static constexpr uint32_t squares() {
        uint32_t bits = 0;
        for (int m = 0; m < MOMENTS; ++m) bits |= static_cast<uint32_t>(Rule::squares[m]) << m;
        return bits;
    }
    static constexpr uint32_t SQUARES = squares();

    // Calls visit(whether moment m is a mean of squares, as a type).
    template <class Visit>
    static __device__ __forceinline__ void by_kind(int m, Visit visit) {
        if ((SQUARES >> m & 1) != 0) {
            visit(std::true_type{});
        } else {
            visit(std::false_type{});
        }
    }

    // All lanes ask for the one word.
    static __device__ __forceinline__ uint32_t load_scale(const Moment& moment, const Lane& lane) {
        Pack<uint32_t, 1> bits;
        load<Reuse::SOON>(bits, reinterpret_cast<const uint32_t*>(moment.scales) + lane.block);
        return bits.element[0];
    }

    static __device__ __forceinline__ void store_scale(const Moment& moment, const Lane& lane, uint32_t bits) {
        if (threadIdx.x % WARP != 0) return;
        store<Reuse::SOON>(reinterpret_cast<uint32_t*>(moment.scales) + lane.block, Pack<uint32_t, 1>{{bits}});
    }

    // What a lane has of a block's moments in memory: the scale's bits all lanes have.
    struct Coded {
        FourCodes codes[MOMENTS];
        uint32_t scale[MOMENTS];
    };

    static __device__ __forceinline__ bool has_moment(const Lane& lane, int m) {
        return (lane.has & Has::FIRST_MOMENT << m) != 0;
    }

    // Scales before all else: in a block that is not whole, lanes differ in how many elements they load.
    static __device__ __forceinline__ void load_scales(const Lane& lane, const Arrays& at, Coded& coded) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            const Moment own = at.moment[m];
            if (has_moment(lane, m)) coded.scale[m] = load_scale(own, lane);
        }
    }

    template <class Together>
    static __device__ __forceinline__ void load_codes(Together together, const Lane& lane, const Arrays& at,
                                                      Coded& coded) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            const Code* const codes = at.moment[m].codes;
            if (has_moment(lane, m)) take<Reuse::NEXT_STEP>(together, lane, coded.codes[m], codes);
        }
    }

    static __device__ __forceinline__ void decode(const Lane& lane, const Coded& coded, Floats (&moment)[MOMENTS]) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (!has_moment(lane, m)) continue;
            by_kind(m, [&](auto square) {
                moment[m] = decoded_block<Codes<decltype(square)::value>>(coded.codes[m], coded.scale[m]);
            });
        }
    }

    static __device__ __forceinline__ void encode(const Lane& lane, uint32_t place, Floats (&moment)[MOMENTS],
                                                  Coded& coded) {
        if (!lane.together()) {
            // What a rule makes of elements that are not there has no part in the largest.
            for (int j = 0; j < N; ++j) {
                for (int m = 0; m < MOMENTS; ++m) moment[m].element[j] = lane.holds(j) ? moment[m].element[j] : 0.0f;
            }
        }
        uint32_t random[N];
        for (int j = 0; j < N; ++j) random[j] = mixed(place + static_cast<uint32_t>(lane.place(j)));
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (!has_moment(lane, m)) continue;
            by_kind(m, [&](auto square) {
                coded.scale[m] = encode_block<Codes<decltype(square)::value>>(moment[m], random, m, coded.codes[m]);
            });
        }
    }

    template <class Together>
    static __device__ __forceinline__ void store_codes(Together together, const Lane& lane, const Arrays& at,
                                                       const Coded& coded) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (has_moment(lane, m)) put<Reuse::NEXT_STEP>(together, lane, at.moment[m].codes, coded.codes[m]);
        }
    }

    static __device__ __forceinline__ void store_scales(const Lane& lane, const Arrays& at, const Coded& coded) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (has_moment(lane, m)) store_scale(at.moment[m], lane, coded.scale[m]);
        }
    }

    // ---- a block

    // The rule's step of element j.
    static __device__ __forceinline__ void update(const Step& step, float& p, float g, Floats (&moment)[MOMENTS],
                                                  int j) {
        float own[MOMENTS];
        for (int m = 0; m < MOMENTS; ++m) own[m] = moment[m].element[j];
        Rule::update(step.rule, p, g, own);
        for (int m = 0; m < MOMENTS; ++m) moment[m].element[j] = own[m];
    }

    template <class Together>
    static __device__ __forceinline__ void event_of_weights(Together together, const Step& step, const Lane& lane,
                                                            const Arrays& at, Floats& p) {
        Floats slow, outer{};
        take<Reuse::NEXT_STEP>(together, lane, slow, at.slow);
        if ((lane.has & Has::WITH_COMPANION) != 0) take<Reuse::NEXT_STEP>(together, lane, outer, at.companion);
        for (int j = 0; j < N; ++j) step.slow.weights(p.element[j], slow.element[j], outer.element[j]);
        if ((lane.has & Has::WITH_COMPANION) != 0) put<Reuse::NEXT_STEP>(together, lane, at.companion, outer);
        put<Reuse::NEXT_STEP>(together, lane, at.slow, slow);
    }

    static __device__ __forceinline__ void block(const Step& step, const Lane& lane, const Arrays& at,
                                                 const ElementTypes& types) {
        Coded coded;
        Raw gradient, weights;
        load_scales(lane, at, coded);
        by_place(lane, [&](auto together) {
            gradient = Memory::load_gradient(together, lane, at, types);
            weights = Memory::load_weights(together, lane, at);
            load_codes(together, lane, at, coded);
        });
        Floats p = Memory::weights_in(lane, weights, types), g = Memory::gradient_in(gradient, types),
               moment[MOMENTS] = {};
        if (Rule::reads_gradient && (lane.has & Has::CAPTURE) != 0) {
            by_place(lane, [&](auto together) { put<Reuse::NEXT_STEP>(together, lane, at.slow, p); });
        }
        decode(lane, coded, moment);
#pragma unroll
        for (int j = 0; j < N; ++j) update(step, p.element[j], g.element[j], moment, j);
        if ((lane.has & Has::EVENT_OF_MOMENT) != 0) {
            Floats cached{};
            if ((lane.has & Has::CACHED) != 0) {
                FourCodes codes;
                const uint32_t scale = load_scale(at.cached, lane);
                by_place(lane, [&](auto together) { take<Reuse::NEXT_STEP>(together, lane, codes, at.cached.codes); });
                cached = decoded_block<Codes<false>>(codes, scale);
            }
            for (int j = 0; j < N; ++j) step.slow.moment(moment[0].element[j], cached.element[j]);
        }
        encode(lane, at.place, moment, coded);
        if ((lane.has & Has::EVENT) != 0) {
            by_place(lane, [&](auto together) { event_of_weights(together, step, lane, at, p); });
        }
        by_place(lane, [&](auto together) {
            store_codes(together, lane, at, coded);
            // Equal to the first moment, and by its draw.
            if ((lane.has & Has::CACHED) != 0) put<Reuse::NEXT_STEP>(together, lane, at.cached.codes, coded.codes[0]);
            if (Rule::reads_gradient || (lane.has & Has::WEIGHTS) != 0)
                Memory::store_weights(together, lane, at, types, p);
        });
        store_scales(lane, at, coded);
        if ((lane.has & Has::CACHED) != 0) store_scale(at.cached, lane, coded.scale[0]);
    }

    // The same of a row whose policy averages: see averaged_elements in walk.cuh.
    static __device__ __forceinline__ void averaged_block(const Step& step, const Lane& lane, const Arrays& at,
                                                          const ElementTypes& types) {
        Coded coded;
        Raw gradient, weights;
        Floats kept{};
        if constexpr (Rule::reads_gradient) load_scales(lane, at, coded);
        by_place(lane, [&](auto together) {
            gradient = Memory::load_gradient(together, lane, at, types);
            weights = Memory::load_weights(together, lane, at);
            if constexpr (Rule::reads_gradient) {
                if ((lane.has & Has::CAPTURE) == 0) take<Reuse::NEXT_STEP>(together, lane, kept, at.slow);
                load_codes(together, lane, at, coded);
            } else {
                take<Reuse::NEXT_STEP>(together, lane, kept, at.companion);
            }
        });
        Floats p = Memory::weights_in(lane, weights, types), x = kept, moment[MOMENTS] = {};
        if constexpr (Rule::reads_gradient) {
            const Floats z = (lane.has & Has::CAPTURE) != 0 ? p : kept, g = Memory::gradient_in(gradient, types);
            decode(lane, coded, moment);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                x.element[j] = step.slow.average(p.element[j], z.element[j]);
                p.element[j] = z.element[j];
                update(step, p.element[j], g.element[j], moment, j);
            }
        }
        const Floats z = p;
        for (int j = 0; j < N; ++j) step.slow.averaged(p.element[j], z.element[j], x.element[j]);
        // Before the moments are encoded: for both at once there are no registers.
        by_place(lane, [&](auto together) {
            put<Reuse::NEXT_STEP>(together, lane, at.slow, z);
            if constexpr (!Rule::reads_gradient) put<Reuse::NEXT_STEP>(together, lane, at.companion, x);
            Memory::store_weights(together, lane, at, types, p);
        });
        if constexpr (Rule::reads_gradient) {
            encode(lane, at.place, moment, coded);
            by_place(lane, [&](auto together) { store_codes(together, lane, at, coded); });
            store_scales(lane, at, coded);
        }
    }

    template <bool AVERAGED>
    static __device__ __forceinline__ void chunk(const Launch& launch, const ElementTypes& types) {
        const Chunk chunk = launch.chunks[blockIdx.x];
        void* const gradient = launch.gradients[chunk.row];
        if (gradient == nullptr || skips_step(launch.arguments)) return;

        // In shared memory and not in each thread's registers, which it would fill by half.
        __shared__ Step step;
        __shared__ Arrays at;
        if (threadIdx.x == 0) {
            step = static_cast<const Step*>(launch.steps)[chunk.row];
            at = Memory::arrays(step, launch.rows[chunk.row], gradient, chunk, types);
        }
        __syncthreads();
        if (!AVERAGED && !Rule::reads_gradient && !step.slow.due) return;

        const uint32_t has = from_first_lane(at.has);
#pragma unroll 1
        for (int begin = static_cast<int>(from_first_lane(threadIdx.x / WARP)) * CODE_BLOCK; begin < chunk.count;
             begin += CHUNK_THREADS / WARP * CODE_BLOCK) {
            const Lane lane = lane_of(has, begin, chunk.count);
            if constexpr (AVERAGED) {
                averaged_block(step, lane, at, types);
            } else {
                block(step, lane, at, types);
            }
            // One lane wrote the scales, and waits for the others to go on with it.
            __syncwarp();
        }
    }
};

template <class Rule>
__global__ void __launch_bounds__(CHUNK_THREADS, 1024 / CHUNK_THREADS) coded(Launch launch, ElementTypes types) {
    CodedWalk<Rule>::template chunk<false>(launch, types);
}

// The same for a policy that averages.
template <class Rule>
__global__ void __launch_bounds__(CHUNK_THREADS, 1024 / CHUNK_THREADS)
    coded_averaged(Launch launch, ElementTypes types) {
    CodedWalk<Rule>::template chunk<true>(launch, types);
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
