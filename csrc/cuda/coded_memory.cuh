// The memory of a chunk whose moments lie in codes (state/int8.h), and how a warp's lanes reach it.
//
// Which types parameters and gradients have is the launch's to tell, and not the compiler's: no more depends on them
// than a few loads, stores and conversions, between which a launch chooses by branches that all of its threads take
// alike. Compiled for each pattern of dtypes, the kernels would take five times as long to build.
#pragma once

#include <cstdint>
#include <cstring>

#include "../table/prologue.h"
#include "codes.cuh"
#include "lanes.cuh"
#include "memory.cuh"

namespace lookahead_fused {
inline namespace LF_ISA {

struct ElementTypes {
    Dtype param, grad;
};

template <class Rule>
struct CodedMemory {
    using Step = RowStep<Rule, float>;
    using Floats = FourFloats;
    static constexpr int MOMENTS = Rule::MOMENTS, N = CODES_OF_LANE;

    struct Moment {
        Code* codes;
        float* scales;
    };

    // A chunk's own part of its row's arrays; null where the row has none and where this pass leaves it alone.
    struct Arrays {
        uint32_t has;
        uint32_t place;  // of its first element in the row, with the row's key for rounding
        void* param;     // null where that is `whole`
        float* whole;
        LowHalf* low;
        const void* grad;
        float *slow, *companion;
        Moment moment[MOMENTS], cached;
    };

    static __device__ Arrays arrays(const Step& step, const Row& row, void* gradient, const Chunk& chunk,
                                    const ElementTypes& types) {
        const auto part = [&](void* array, int bytes) {
            return array == nullptr ? nullptr : static_cast<char*>(array) + chunk.offset * bytes;
        };
        const auto moment = [&](int codes, int scales) {
            Moment own{};
            if (row.column[codes] == nullptr) return own;
            own.codes = reinterpret_cast<Code*>(part(row.column[codes], 1));
            own.scales = static_cast<float*>(row.column[scales]) + chunk.offset / CODE_BLOCK;
            return own;
        };
        const bool in_fp32 = types.param == Dtype::FLOAT32, halved = types.param == Dtype::BFLOAT16;
        Arrays at{};
        at.place = static_cast<uint32_t>(chunk.offset) + step.rounding;
        if (!in_fp32) at.param = part(row.column[PARAM], 2);
        if (!halved) at.whole = reinterpret_cast<float*>(part(row.column[in_fp32 ? PARAM : MASTER], 4));
        if (halved) at.low = reinterpret_cast<LowHalf*>(part(row.column[MASTER], 2));
        if (Rule::reads_gradient) at.grad = part(gradient, types.grad == Dtype::FLOAT32 ? 4 : 2);
        at.slow = reinterpret_cast<float*>(part(row.column[SLOW], 4));
        at.companion = reinterpret_cast<float*>(part(row.column[COMPANION], 4));
        const bool acts_on_moment = Rule::reads_gradient || step.slow.acts_on_moment;
        for (int m = 0; m < MOMENTS; ++m) {
            if (m > 0 || acts_on_moment) at.moment[m] = moment(MOMENT + m, MOMENT_SCALE + m);
        }
        at.cached = moment(CACHED_MOMENT, CACHED_SCALE);

        const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
        uintptr_t all = address(at.param) | address(at.whole) | address(at.low) | address(at.grad) | address(at.slow);
        all |= address(at.companion) | address(at.cached.codes);
        for (int m = 0; m < MOMENTS; ++m) all |= address(at.moment[m].codes);

        const auto flag = [&](bool has, uint32_t bit) { at.has |= has ? bit : 0; };
        for (int m = 0; m < MOMENTS; ++m) flag(at.moment[m].codes != nullptr, Has::FIRST_MOMENT << m);
        const bool event_of_moment = step.slow.due && at.moment[0].codes != nullptr;
        flag(event_of_moment && at.cached.codes != nullptr, Has::CACHED);
        flag(at.companion != nullptr, Has::WITH_COMPANION);
        flag(at.low != nullptr, Has::LOW_HALVES);
        flag(at.whole != nullptr, Has::WHOLE);
        flag(all % 16 == 0, Has::ALIGNED);
        flag(step.slow.due, Has::EVENT);
        flag(event_of_moment, Has::EVENT_OF_MOMENT);
        flag(step.slow.capture, Has::CAPTURE);
        // What is not computed here and not changed here stays as it is, also where it was rounded.
        flag(step.slow.restarts, Has::WEIGHTS);
        return at;
    }

    // Weights or gradients as they lie in memory, before any of them is looked at: fp32 numbers, or 16 bits of each,
    // and after those the low halves of what has any.
    struct Raw {
        uint32_t word[N];
    };

    template <class M>
    static __device__ __forceinline__ Pack<M, N> pack_in(const Raw& raw, int word = 0) {
        Pack<M, N> pack;
        std::memcpy(&pack, raw.word + word, sizeof(pack));
        return pack;
    }

    template <class M>
    static __device__ __forceinline__ void set(Raw& raw, const Pack<M, N>& pack, int word = 0) {
        std::memcpy(raw.word + word, &pack, sizeof(pack));
    }

    template <class M>
    static __device__ __forceinline__ Floats widened(const Pack<M, N>& pack) {
        Floats wide;
        for (int j = 0; j < N; ++j) wide.element[j] = widen(pack.element[j]);
        return wide;
    }

    template <class Together>
    static __device__ __forceinline__ Raw load_weights(Together together, const Lane& lane, const Arrays& at) {
        Raw raw;
        if ((lane.has & Has::WHOLE) != 0) {
            Floats whole;
            take<Reuse::SOON>(together, lane, whole, at.whole);
            set(raw, whole);
        } else {
            // bf16 and fp16 travel alike.
            Pack<BFloat16, N> half;
            take<Reuse::SOON>(together, lane, half, at.param);
            set(raw, half);
            if ((lane.has & Has::LOW_HALVES) != 0) {
                Pack<LowHalf, N> low;
                take<Reuse::NEXT_STEP>(together, lane, low, at.low);
                set(raw, low, N / 2);
            }
        }
        return raw;
    }

    static __device__ __forceinline__ Floats weights_in(const Lane& lane, const Raw& raw, const ElementTypes& types) {
        if ((lane.has & Has::WHOLE) != 0) return pack_in<float>(raw);
        if (types.param == Dtype::FLOAT16) return widened(pack_in<Float16>(raw));
        const auto param = pack_in<BFloat16>(raw);
        if ((lane.has & Has::LOW_HALVES) == 0) return widened(param);
        const auto low = pack_in<LowHalf>(raw, N / 2);
        Floats joined;
        for (int j = 0; j < N; ++j) joined.element[j] = join(param.element[j], low.element[j]);
        return joined;
    }

    template <class Together>
    static __device__ __forceinline__ void store_weights(Together together, const Lane& lane, const Arrays& at,
                                                         const ElementTypes& types, const Floats& p) {
        if ((lane.has & Has::WHOLE) != 0) put<Reuse::SOON>(together, lane, at.whole, p);
        if (types.param == Dtype::FLOAT16) {
            Pack<Float16, N> param;
            for (int j = 0; j < N; ++j) narrow(p.element[j], param.element[j]);
            put<Reuse::SOON>(together, lane, at.param, param);
        } else if (types.param == Dtype::BFLOAT16) {
            Pack<BFloat16, N> param;
            if ((lane.has & Has::LOW_HALVES) != 0) {
                Pack<LowHalf, N> low;
                for (int j = 0; j < N; ++j) halve(p.element[j], param.element[j], low.element[j]);
                put<Reuse::NEXT_STEP>(together, lane, at.low, low);
            } else {
                for (int j = 0; j < N; ++j) narrow(p.element[j], param.element[j]);
            }
            put<Reuse::SOON>(together, lane, at.param, param);
        }
    }

    template <class Together>
    static __device__ __forceinline__ Raw load_gradient(Together together, const Lane& lane, const Arrays& at,
                                                        const ElementTypes& types) {
        Raw raw{};
        if constexpr (Rule::reads_gradient) {
            if (types.grad == Dtype::FLOAT32) {
                Floats whole;
                take<Reuse::NEXT_STEP>(together, lane, whole, at.grad);
                set(raw, whole);
            } else {
                Pack<BFloat16, N> half;
                take<Reuse::NEXT_STEP>(together, lane, half, at.grad);
                set(raw, half);
            }
        }
        return raw;
    }

    static __device__ __forceinline__ Floats gradient_in(const Raw& raw, const ElementTypes& types) {
        if (types.grad == Dtype::FLOAT32) return pack_in<float>(raw);
        return types.grad == Dtype::BFLOAT16 ? widened(pack_in<BFloat16>(raw)) : widened(pack_in<Float16>(raw));
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
