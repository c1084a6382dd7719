// The walk over a table on a CPU: prologue over rows, then chunks of elements in SIMD registers.
//
// This file is compiled once for each instruction set, with LF_ISA its name and LF_REGISTER_BYTES its register width.
// Every rule is crossed with every pattern of dtypes, by the lists; none is named here.
#pragma once

#include <cstring>
#include <type_traits>

#include "../table/prologue.h"
#include "../table/walks.h"
#include "coded_block.h"
#include "kernels.h"
#include "prefetch.h"
#include "vector.h"

namespace lookahead_fused {
inline namespace LF_ISA {

// P is the parameter's type in memory, G the gradient's, S the moments'.
template <class Rule, class P, class G, class S>
struct Walk {
    using T = Compute<P>;
    static constexpr int N = LF_REGISTER_BYTES / sizeof(T);
    using Step = RowStep<Rule, T>;
    // Chunks of up to SMALL elements are fetched that many chunks before their turn. Over 1000 tensors of 64 elements
    // that takes the walk from 67 to 56 us (a Xeon with AMX); from 2 to 12 ahead make no difference.
    static constexpr int SMALL = 1024, CHUNKS_AHEAD = 3;
    // Moments lie in codes, which a block's elements are encoded to together.
    static constexpr bool CODED = std::is_same_v<S, Code>;

    // A chunk's own part of its row's arrays, null where the row has none and where this pass leaves it alone.
    struct Arrays {
        P* param;
        const G* grad;
        Master<P>* master;
        StateArrays<Rule, T, S> state;
        uint32_t place;  // of its first element in the row, with the row's key for rounding
    };
    struct BlockArrays : Arrays {
        CodedBlock<Rule>* block;
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
        at.state.slow = part<T>(row.column[SLOW], offset);
        at.state.companion = part<T>(row.column[COMPANION], offset);
        at.state.cached = part<S>(row.column[CACHED_MOMENT], offset);
        for (int m = 0; m < Rule::MOMENTS; ++m) at.state.moment[m] = part<S>(row.column[MOMENT + m], offset);
        if (!Rule::reads_gradient && !step.slow.acts_on_moment) at.state.moment[0] = nullptr;
        at.place = static_cast<uint32_t>(offset) + step.rounding;
        return at;
    }

    static LF_HD ScaleArrays<Rule> scales(const Row& row, int64_t offset) {
        ScaleArrays<Rule> at;
        at.cached = part<float>(row.column[CACHED_SCALE], offset / CODE_BLOCK);
        for (int m = 0; m < Rule::MOMENTS; ++m) {
            at.moment[m] = part<float>(row.column[MOMENT_SCALE + m], offset / CODE_BLOCK);
        }
        return at;
    }

    // The WIDTH elements from i on; At is BlockArrays where moments lie in codes.
    template <int WIDTH, class At>
    static LF_HD void elements(const Step& step, const At& at, int64_t i) {
        using V = Vec<T, WIDTH>;
        const auto load = [i](const auto* from) {
            return Memory<T, WIDTH, std::decay_t<decltype(*from)>>::load(from + i);
        };
        const auto store = [i](auto* to, V value) {
            Memory<T, WIDTH, std::decay_t<decltype(*to)>>::store(to + i, value);
        };
        const StateArrays<Rule, T, S>& state = at.state;
        using WithMaster = MasterMemory<T, WIDTH, P>;
        V p = at.master != nullptr ? WithMaster::load(at.param + i, at.master + i) : load(at.param);
        V moment[Rule::MOMENTS] = {};
        for (int m = 0; m < Rule::MOMENTS; ++m) {
            if (state.moment[m] == nullptr) continue;
            if constexpr (CODED) {
                moment[m] = at.block->template load<WIDTH>(i, m);
            } else {
                moment[m] = load(state.moment[m]);
            }
        }
        V start = p, x{};
        if (step.slow.kind == AVERAGING) {
            // Of another optimizer's step z is where theta was put for it, and x is kept.
            if (state.companion != nullptr) x = load(state.companion);
            if constexpr (Rule::reads_gradient) {
                const V z = step.slow.capture ? p : load(state.slow);
                x = step.slow.average(p, z);
                p = z;
            }
        }
        V g{};
        if constexpr (Rule::reads_gradient) g = load(at.grad);
        Rule::update(step.rule, p, g, moment);
        [[maybe_unused]] const MomentMemory<T, WIDTH, S> moments(at.place + static_cast<uint32_t>(i));
        if (step.slow.kind == AVERAGING) {
            store(state.slow, p);
            const V z = p;
            step.slow.averaged(p, z, x);
            if (state.companion != nullptr) store(state.companion, x);
        } else if (step.slow.due || step.slow.capture) {
            V slow = step.slow.capture ? start : load(state.slow);
            if (step.slow.due) {
                V outer{};
                if (state.companion != nullptr) outer = load(state.companion);
                step.slow.weights(p, slow, outer);
                if (state.companion != nullptr) store(state.companion, outer);
                if (state.moment[0] != nullptr) {
                    V cached{};
                    if constexpr (CODED) {
                        if (state.cached != nullptr) cached = at.block->template load_cached<WIDTH>(i);
                    } else {
                        if (state.cached != nullptr) cached = load(state.cached);
                    }
                    step.slow.moment(moment[0], cached);
                    // By the first moment's draw: the two are equal.
                    if constexpr (!CODED) {
                        if (state.cached != nullptr) moments.store(state.cached + i, cached, 0);
                    }
                }
            }
            store(state.slow, slow);
        }
        for (int m = 0; m < Rule::MOMENTS; ++m) {
            if (state.moment[m] == nullptr) continue;
            if constexpr (CODED) {
                at.block->keep(moment[m], i, m);
            } else {
                moments.store(state.moment[m] + i, moment[m], m);
            }
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
        // A line of codes is as long as several of the others.
        const bool moments = !CODED || i % 64 == 0;
        for (int m = 0; m < Rule::MOMENTS; ++m) {
            if (moments && at.state.moment[m] != nullptr) __builtin_prefetch(at.state.moment[m] + i, 1);
        }
        if (!step.slow.due) return;
        if (at.state.slow != nullptr) __builtin_prefetch(at.state.slow + i, 1);
        if (at.state.companion != nullptr) __builtin_prefetch(at.state.companion + i, 1);
        if (moments && at.state.cached != nullptr) __builtin_prefetch(at.state.cached + i, 1);
    }

    // Where rows are small, the processor's own prefetchers have nothing to go by. Inline, or GCC drops the call: a
    // function that only prefetches has no effect.
    static LF_HD void prefetch_small(const Step& step, const Row& row, const Chunk& piece) {
        constexpr int LINE = 64 / sizeof(T), LINES = 4;
        const Arrays at = arrays(step, row, piece.offset);
        for (int i = 0; i < LINES * LINE && i < piece.count; i += LINE) prefetch(step, at, i);
    }

    // The last elements of a chunk, fewer than 2 * WIDTH, in narrower and narrower registers: the same operations.
    template <int WIDTH, class At>
    static LF_HD void tail(const Step& step, const At& at, int64_t i, int count) {
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

    // The table's binding has made chunks that begin where blocks do.
    static void coded_chunk(const Step& step, const Row& row, const Chunk& piece) {
        const int ahead = prefetch_ahead();
        const bool streams = row.numel > 8 * ahead;
        for (int64_t first = 0; first < piece.count; first += CODE_BLOCK) {
            const int64_t left = piece.count - first;
            const int count = static_cast<int>(left < CODE_BLOCK ? left : CODE_BLOCK);
            const int whole = count / N * N;
            BlockArrays at{arrays(step, row, piece.offset + first), nullptr};
            const ScaleArrays<Rule> of_block = scales(row, piece.offset + first);
            const bool with_cached = step.slow.due && at.state.moment[0] != nullptr && at.state.cached != nullptr;
            CodedBlock<Rule> block(at.state, of_block, count, with_cached);
            at.block = &block;
            for (int i = 0; i < whole; i += N) {
                if (streams) prefetch(step, at, i + ahead);
                elements<N>(step, at, i);
            }
            if (whole < count) tail<N / 2>(step, at, whole, count - whole);
            block.write(at.place);
        }
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
            if constexpr (CODED) {
                coded_chunk(step, table.rows[piece.row], piece);
            } else {
                chunk(step, table.rows[piece.row], piece);
            }
        }
    }

    static constexpr Kernel kernel{&rows, &chunks, sizeof(Step)};
};

inline const Kernel* find(const char* rule, Dtype param, Dtype grad, Dtype state) {
    const Kernel* found = nullptr;
    Rules::any([&](auto r) {
        using Rule = decltype(r);
        if (std::strcmp(rule, Rule::name) != 0) return false;
        return with_walk<Rule>(param, grad, state, [&](auto pattern) {
            using Pattern = decltype(pattern);
            found = &Walk<Rule, typename Pattern::Param, typename Pattern::Grad, typename Pattern::State>::kernel;
        });
    });
    return found;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
