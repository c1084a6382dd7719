// The walk over a table on a CPU: prologue over rows, then chunks of elements in SIMD registers.
//
// This file is compiled once for each instruction set, with LF_ISA its name and LF_REGISTER_BYTES its register width,
// and gives out one Kernels table. Adding a rule here is one line in find().
#pragma once

#include <type_traits>

#include "../rules/adam.h"
#include "../rules/sgd.h"
#include "../rules/sync.h"
#include "../table/prologue.h"
#include "../table/table.h"
#include "kernels.h"
#include "prefetch.h"
#include "vector.h"

namespace lookahead_fused {
inline namespace LF_ISA {

// P is the parameter's type in memory, G the gradient's.
template <class Rule, class P, class G>
struct Walk {
    using T = Compute<P>;
    static constexpr int N = LF_REGISTER_BYTES / sizeof(T);
    using Step = RowStep<Rule, T>;
    // Chunks of up to SMALL elements are fetched that many chunks before their turn. Over 1000 tensors of 64 elements
    // that takes the walk from 67 to 56 us (a Xeon with AMX); from 2 to 12 ahead make no difference.
    static constexpr int SMALL = 1024, CHUNKS_AHEAD = 3;

    // The addresses of what a register holds.
    struct Lanes {
        P* param;
        const G* grad;
        T* master;
        T* slow;
        T* slow_moment;
        T* moment[Rule::MOMENTS];
    };

    template <int WIDTH>
    static LF_HD void elements(const Step& step, const Lanes& at) {
        using V = Vec<T, WIDTH>;
        const auto load = [](const auto* from) { return Memory<T, WIDTH, std::decay_t<decltype(*from)>>::load(from); };
        const auto store = [](auto* to, V value) { Memory<T, WIDTH, std::decay_t<decltype(*to)>>::store(to, value); };
        V p = at.master != nullptr ? load(at.master) : load(at.param);
        V moment[Rule::MOMENTS] = {};
        for (int i = 0; i < Rule::MOMENTS; ++i) {
            if (step.moments >> i & 1) moment[i] = load(at.moment[i]);
        }
        const V start = p;
        V g{};
        if constexpr (Rule::reads_gradient) g = load(at.grad);
        Rule::update(step.rule, p, g, moment);
        if (step.sync.due || step.sync.capture) {
            V slow = step.sync.capture ? start : load(at.slow);
            if (step.sync.due) {
                step.sync.weights(p, slow);
                if (step.moments & 1) {
                    V slow_moment{};
                    if (step.sync.pullback == PULLBACK_INTERPOLATE) slow_moment = load(at.slow_moment);
                    step.sync.moment(moment[0], slow_moment);
                    if (step.sync.pullback == PULLBACK_INTERPOLATE) store(at.slow_moment, slow_moment);
                }
            }
            store(at.slow, slow);
        }
        for (int i = 0; i < Rule::MOMENTS; ++i) {
            if (step.moments >> i & 1) store(at.moment[i], moment[i]);
        }
        if (at.master != nullptr) store(at.master, p);
        store(at.param, p);
    }

    // An address past the end of a tensor is harmless here.
    static LF_HD void prefetch(const Step& step, const Lanes& at, int ahead) {
        __builtin_prefetch(at.param + ahead, 1);
        if constexpr (Rule::reads_gradient) __builtin_prefetch(at.grad + ahead, 0);
        if (at.master != nullptr) __builtin_prefetch(at.master + ahead, 1);
        if (step.sync.due) __builtin_prefetch(at.slow + ahead, 1);
        for (int i = 0; i < Rule::MOMENTS; ++i) {
            if (step.moments >> i & 1) __builtin_prefetch(at.moment[i] + ahead, 1);
        }
    }

    // Where rows are small, the processor's own prefetchers have nothing to go by. Inline, or GCC drops the call: a
    // function that only prefetches has no effect.
    static LF_HD void prefetch_small(const Table& table, const Step& step, int64_t i) {
        constexpr int LINE = 64 / sizeof(T), LINES = 4;
        const Chunk& piece = table.chunks[i];
        const Row& row = table.rows[piece.row];
        if (!takes_part(row)) return;
        const Lanes at = lanes(row, piece.offset);
        for (int ahead = 0; ahead < LINES * LINE && ahead < piece.count; ahead += LINE) prefetch(step, at, ahead);
    }

    static LF_HD void forward(Lanes& at, int count) {
        const auto move = [count](auto*& pointer) {
            if (pointer != nullptr) pointer += count;
        };
        move(at.param);
        move(at.grad);
        move(at.master);
        move(at.slow);
        move(at.slow_moment);
        for (int i = 0; i < Rule::MOMENTS; ++i) move(at.moment[i]);
    }

    // The last elements of a row, fewer than 2 * WIDTH, in narrower and narrower registers: the same operations.
    template <int WIDTH>
    static LF_HD void tail(const Step& step, Lanes& at, int count) {
        if (count & WIDTH) {
            elements<WIDTH>(step, at);
            forward(at, WIDTH);
        }
        if constexpr (WIDTH > 1) tail<WIDTH / 2>(step, at, count);
    }

    static Lanes lanes(const Row& row, int64_t offset) {
        const auto shift = [offset](auto* base) { return base == nullptr ? nullptr : base + offset; };
        Lanes at{};
        at.param = shift(static_cast<P*>(row.column[PARAM]));
        at.grad = shift(static_cast<const G*>(row.column[GRAD]));
        at.master = shift(static_cast<T*>(row.column[MASTER]));
        at.slow = shift(static_cast<T*>(row.column[SLOW]));
        at.slow_moment = shift(static_cast<T*>(row.column[SLOW_MOMENT]));
        for (int i = 0; i < Rule::MOMENTS; ++i) at.moment[i] = shift(static_cast<T*>(row.column[MOMENT + i]));
        return at;
    }

    static void chunk(const Row& row, const Step& step, int64_t offset, int32_t count) {
        Lanes at = lanes(row, offset);
        const int ahead = prefetch_ahead();
        // What lies behind a small tensor is not what comes next.
        const bool streams = row.numel > 8 * ahead;
        for (; count >= N; count -= N) {
            if (streams) prefetch(step, at, ahead);
            elements<N>(step, at);
            forward(at, N);
        }
        if (count > 0) tail<N / 2>(step, at, count);
    }

    static void rows(const Table& table, const StepArguments& arguments, void* steps, int32_t* step_of_row) {
        Step* out = static_cast<Step*>(steps);
        int32_t made = 0, group = -1;
        int64_t applied = -1;
        bool loaded = false;
        for (int64_t i = 0; i < table.row_count; ++i) {
            const Row& row = table.rows[i];
            if (!takes_part(row)) continue;
            double& counter = *static_cast<double*>(row.column[STEP]);
            // Neighbours mostly share group and step, and then the coefficients, powers and all.
            if (row.group != group || static_cast<int64_t>(counter) != applied || (row.moments_loaded != 0) != loaded) {
                group = row.group;
                applied = static_cast<int64_t>(counter);
                loaded = row.moments_loaded != 0;
                out[made++] = prepare<Rule, T>(table.groups[group], applied, loaded, arguments);
            }
            step_of_row[i] = made - 1;
            counter += 1.0;
        }
    }

    static void chunks(const Table& table, const void* steps, const int32_t* step_of_row, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Chunk& piece = table.chunks[i];
            const Row& row = table.rows[piece.row];
            if (!takes_part(row)) continue;
            const Step& step = static_cast<const Step*>(steps)[step_of_row[piece.row]];
            if constexpr (!Rule::reads_gradient) {
                if (!step.sync.due) continue;
            }
            // With the columns of this row's step: neighbours are mostly of one group.
            if (piece.count <= SMALL && i + CHUNKS_AHEAD < end) prefetch_small(table, step, i + CHUNKS_AHEAD);
            chunk(row, step, piece.offset, piece.count);
        }
    }

    static constexpr Kernel kernel{&rows, &chunks, sizeof(Step)};
};

template <class Rule>
const Kernel* find(Dtype param, Dtype grad) {
    if (param == Dtype::FLOAT64 && grad == Dtype::FLOAT64) return &Walk<Rule, double, double>::kernel;
    if (param == Dtype::FLOAT64 && grad == Dtype::FLOAT32) return &Walk<Rule, double, float>::kernel;
    if (param == Dtype::FLOAT32 && grad == Dtype::FLOAT32) return &Walk<Rule, float, float>::kernel;
    if (param == Dtype::BFLOAT16 && grad == Dtype::BFLOAT16) return &Walk<Rule, BFloat16, BFloat16>::kernel;
    if (param == Dtype::BFLOAT16 && grad == Dtype::FLOAT32) return &Walk<Rule, BFloat16, float>::kernel;
    if (param == Dtype::FLOAT16 && grad == Dtype::FLOAT16) return &Walk<Rule, Float16, Float16>::kernel;
    if (param == Dtype::FLOAT16 && grad == Dtype::FLOAT32) return &Walk<Rule, Float16, float>::kernel;
    return nullptr;
}

inline const Kernel* find(const char* rule, Dtype param, Dtype grad) {
    if (std::strcmp(rule, Adam::name) == 0) return find<Adam>(param, grad);
    if (std::strcmp(rule, Sgd::name) == 0) return find<Sgd>(param, grad);
    // No gradient is read, so one pattern stands for all of a parameter type's.
    if (std::strcmp(rule, SyncOnly::name) == 0) return find<SyncOnly>(param, param);
    return nullptr;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
