// The walk over a table on a CPU: prologue over rows, then chunks of elements in SIMD registers.
//
// This file is compiled once for each instruction set, with LF_ISA its name and LF_REGISTER_BYTES its register width,
// and gives out one Kernels table. Adding a rule here is one line in find().
#pragma once

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
    using V = Vec<T, N>;
    using Step = RowStep<Rule, T>;

    template <class M>
    static LF_HD V load(const M* from) {
        return Memory<T, N, M>::load(from);
    }
    template <class M>
    static LF_HD void store(M* to, V value) {
        Memory<T, N, M>::store(to, value);
    }

    // The addresses of the N elements that a register holds.
    struct Lanes {
        P* param;
        const G* grad;
        T* master;
        T* slow;
        T* slow_moment;
        T* moment[Rule::MOMENTS];
    };

    static LF_HD void element(const Step& step, const Lanes& at) {
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

    // The last elements of a row go through the same code on copies, so that they get the same operations.
    static void tail(const Step& step, const Lanes& at, int count) {
        P param[N] = {};
        G grad[N] = {};
        T master[N] = {}, slow[N] = {}, slow_moment[N] = {}, moment[Rule::MOMENTS][N] = {};
        Lanes copy{param, grad, at.master ? master : nullptr, slow, slow_moment, {}};
        const auto move = [count](auto* to, const auto* from) {
            if (from != nullptr && to != nullptr) std::memcpy(to, from, count * sizeof(*to));
        };
        move(param, at.param);
        move(grad, at.grad);
        move(master, at.master);
        move(slow, at.slow);
        move(slow_moment, at.slow_moment);
        for (int i = 0; i < Rule::MOMENTS; ++i) {
            copy.moment[i] = moment[i];
            move(moment[i], at.moment[i]);
        }
        element(step, copy);
        move(at.param, param);
        move(at.master, master);
        move(at.slow, slow);
        move(at.slow_moment, slow_moment);
        for (int i = 0; i < Rule::MOMENTS; ++i) move(at.moment[i], moment[i]);
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
        const auto forward = [](auto*& pointer) {
            if (pointer != nullptr) pointer += N;
        };
        const int ahead = prefetch_ahead();
        // What lies behind a small tensor is not what comes next.
        const bool streams = row.numel > 8 * ahead;
        for (; count >= N; count -= N) {
            if (streams) prefetch(step, at, ahead);
            element(step, at);
            at.param += N;
            forward(at.grad);
            forward(at.master);
            forward(at.slow);
            forward(at.slow_moment);
            for (int i = 0; i < Rule::MOMENTS; ++i) forward(at.moment[i]);
        }
        if (count > 0) tail(step, at, count);
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
