// The walk over a table on a CPU: prologue over rows, then chunks of elements in SIMD registers.
//
// This file is compiled once for each instruction set, with LF_ISA its name and LF_REGISTER_BYTES its register width.
// Every rule is crossed with every pattern of dtypes, by the lists; none is named here.
#pragma once

#include <cstring>
#include <type_traits>

#include "../table/prologue.h"
#include "../table/walks.h"
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

    // A chunk's own part of its row's arrays, null where the row has none and where this pass leaves it alone.
    struct Arrays {
        P* param;
        const G* grad;
        Master<P>* master;
        StateArrays<Rule, T> state;
    };

    template <class M>
    static LF_HD M* part(void* column, int64_t offset) {
        return column == nullptr ? nullptr : static_cast<M*>(column) + offset;
    }

    static LF_HD Arrays arrays(const Step& step, const Row& row, int64_t offset) {
        Arrays at;
        at.param = static_cast<P*>(row.column[PARAM]) + offset;
        at.grad = Rule::reads_gradient ? static_cast<const G*>(row.column[GRAD]) + offset : nullptr;
        at.master = part<Master<P>>(row.column[MASTER], offset);
        for (int i = STATE; i < STATE_END<Rule>; ++i) at.state[i] = part<T>(row.column[i], offset);
        if (!Rule::reads_gradient && !step.slow.acts_on_moment) at.state[MOMENT] = nullptr;
        return at;
    }

    // The WIDTH elements from i on.
    template <int WIDTH>
    static LF_HD void elements(const Step& step, const Arrays& at, int64_t i) {
        using V = Vec<T, WIDTH>;
        const auto load = [i](const auto* from) {
            return Memory<T, WIDTH, std::decay_t<decltype(*from)>>::load(from + i);
        };
        const auto store = [i](auto* to, V value) {
            Memory<T, WIDTH, std::decay_t<decltype(*to)>>::store(to + i, value);
        };
        using WithMaster = MasterMemory<T, WIDTH, P>;
        V p = at.master != nullptr ? WithMaster::load(at.param + i, at.master + i) : load(at.param);
        V moment[Rule::MOMENTS] = {};
        for (int m = 0; m < Rule::MOMENTS; ++m) {
            if (at.state[MOMENT + m] != nullptr) moment[m] = load(at.state[MOMENT + m]);
        }
        V start = p, x{};
        if (step.slow.kind == AVERAGING) {
            // Of another optimizer's step z is where theta was put for it, and x is kept.
            if (at.state[COMPANION] != nullptr) x = load(at.state[COMPANION]);
            if constexpr (Rule::reads_gradient) {
                const V z = step.slow.capture ? p : load(at.state[SLOW]);
                x = step.slow.average(p, z);
                p = z;
            }
        }
        V g{};
        if constexpr (Rule::reads_gradient) g = load(at.grad);
        Rule::update(step.rule, p, g, moment);
        if (step.slow.kind == AVERAGING) {
            store(at.state[SLOW], p);
            const V z = p;
            step.slow.averaged(p, z, x);
            if (at.state[COMPANION] != nullptr) store(at.state[COMPANION], x);
        } else if (step.slow.due || step.slow.capture) {
            V slow = step.slow.capture ? start : load(at.state[SLOW]);
            if (step.slow.due) {
                V outer{};
                if (at.state[COMPANION] != nullptr) outer = load(at.state[COMPANION]);
                step.slow.weights(p, slow, outer);
                if (at.state[COMPANION] != nullptr) store(at.state[COMPANION], outer);
                if (at.state[MOMENT] != nullptr) {
                    V cached{};
                    if (at.state[CACHED_MOMENT] != nullptr) cached = load(at.state[CACHED_MOMENT]);
                    step.slow.moment(moment[0], cached);
                    if (at.state[CACHED_MOMENT] != nullptr) store(at.state[CACHED_MOMENT], cached);
                }
            }
            store(at.state[SLOW], slow);
        }
        for (int m = 0; m < Rule::MOMENTS; ++m) {
            if (at.state[MOMENT + m] != nullptr) store(at.state[MOMENT + m], moment[m]);
        }
        // What is not computed here and not changed here stays as it is, also where it was rounded.
        if (!Rule::reads_gradient && !step.slow.restarts) return;
        if (at.master != nullptr) {
            WithMaster::store(at.param + i, at.master + i, p);
        } else {
            store(at.param, p);
        }
    }

    // An address past the end of a tensor is harmless here.
    static LF_HD void prefetch(const Step& step, const Arrays& at, int64_t i) {
        __builtin_prefetch(at.param + i, 1);
        if constexpr (Rule::reads_gradient) __builtin_prefetch(at.grad + i, 0);
        if (at.master != nullptr) __builtin_prefetch(at.master + i, 1);
        for (int column = STATE; column < STATE_END<Rule>; ++column) {
            const bool moved = step.slow.due || column >= MOMENT;
            if (at.state[column] != nullptr && moved) __builtin_prefetch(at.state[column] + i, 1);
        }
    }

    // Where rows are small, the processor's own prefetchers have nothing to go by. Inline, or GCC drops the call: a
    // function that only prefetches has no effect.
    static LF_HD void prefetch_small(const Step& step, const Row& row, const Chunk& piece) {
        constexpr int LINE = 64 / sizeof(T), LINES = 4;
        const Arrays at = arrays(step, row, piece.offset);
        for (int i = 0; i < LINES * LINE && i < piece.count; i += LINE) prefetch(step, at, i);
    }

    // The last elements of a chunk, fewer than 2 * WIDTH, in narrower and narrower registers: the same operations.
    template <int WIDTH>
    static LF_HD void tail(const Step& step, const Arrays& at, int64_t i, int count) {
        if (count & WIDTH) {
            elements<WIDTH>(step, at, i);
            i += WIDTH;
        }
        if constexpr (WIDTH > 1) tail<WIDTH / 2>(step, at, i, count);
    }

    static void chunk(const Step& step, const Row& row, const Chunk& piece) {
        const Arrays at = arrays(step, row, piece.offset);
        const int ahead = prefetch_ahead(), whole = piece.count / N * N;
        // What lies behind a small tensor is not what comes next.
        const bool streams = row.numel > 8 * ahead;
        for (int64_t i = 0; i < whole; i += N) {
            if (streams) prefetch(step, at, i + ahead);
            elements<N>(step, at, i);
        }
        if (whole < piece.count) tail<N / 2>(step, at, whole, piece.count - whole);
    }

    static void rows(const Table& table, const StepArguments& arguments, void* steps, int32_t* step_of_row) {
        Step* out = static_cast<Step*>(steps);
        int32_t made = 0, group = -1;
        RowCounts last{};
        PolicyNumbers after{};
        for (int64_t i = 0; i < table.row_count; ++i) {
            const Row& row = table.rows[i];
            step_of_row[i] = -1;
            if (!takes_part(row, arguments.pass)) continue;
            const RowCounts counts = RowCounts::of(row);
            // Neighbours mostly share group and counts, and then the coefficients, powers and all.
            if (row.group != group || !(counts == last)) {
                group = row.group;
                last = counts;
                prepare(table.policy, table.groups[group], counts, arguments, out[made++],
                        [&](const PolicyNumbers& numbers) { after = numbers; });
            }
            step_of_row[i] = made - 1;
            if (arguments.pass == Pass::STEP) advance(row, after);
        }
    }

    static void chunks(const Table& table, const void* steps, const int32_t* step_of_row, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const Chunk& piece = table.chunks[i];
            if (step_of_row[piece.row] < 0) continue;
            const Step& step = static_cast<const Step*>(steps)[step_of_row[piece.row]];
            if (!Rule::reads_gradient && !step.slow.due) continue;
            if (piece.count <= SMALL && i + CHUNKS_AHEAD < end) {
                const Chunk& later = table.chunks[i + CHUNKS_AHEAD];
                // With this row's step: neighbours are mostly of one group.
                if (step_of_row[later.row] >= 0) prefetch_small(step, table.rows[later.row], later);
            }
            chunk(step, table.rows[piece.row], piece);
        }
    }

    static constexpr Kernel kernel{&rows, &chunks, sizeof(Step)};
};

inline const Kernel* find(const char* rule, Dtype param, Dtype grad) {
    const Kernel* found = nullptr;
    Rules::any([&](auto r) {
        using Rule = decltype(r);
        if (std::strcmp(rule, Rule::name) != 0) return false;
        return with_walk<Rule>(param, grad, [&](auto pattern) {
            using Pattern = decltype(pattern);
            found = &Walk<Rule, typename Pattern::Param, typename Pattern::Grad>::kernel;
        });
    });
    return found;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
