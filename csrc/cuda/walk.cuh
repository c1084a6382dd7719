// The walk over a table on an NVIDIA GPU: a thread for each row, then a block for each chunk.
//
// Nothing a step decides comes back to the host: the step counters, the policy's event and whether found_inf skips the
// step are read and written here. This file is compiled once for each rule (walk.cu.in), which it crosses with every
// pattern of dtypes by the list.
#pragma once

#include "runtime.h"

#include "../table/prologue.h"
#include "../table/walks.h"
#include "coded.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "memory.cuh"

namespace lookahead_fused {
inline namespace LF_ISA {

// P is the parameter's type in memory, G the gradient's, S the moments'.
template <class Rule, class P, class G, class S>
struct Walk {
    using T = Compute<P>;
    using Step = RowStep<Rule, T>;
    static constexpr int MOMENTS = Rule::MOMENTS;

    // Moments are kept in fewer bits than they are computed in, and rounded without bias.
    static constexpr bool NARROW_STATE = sizeof(S) < sizeof(T);

    // What a thread takes at a time: 16 bytes of the parameter. Not of fp64 parameters with fp32 gradients, a rare pair
    // whose conversions would not fit the registers: 8 bytes. Nor beside narrow moments, whose rounding takes registers
    // too: as many elements as 16 bytes hold of what is computed in.
    static constexpr int VECTOR = sizeof(G) < sizeof(P) ? 1 : 16 / (NARROW_STATE ? sizeof(T) : sizeof(P));

    // The same of a bf16 parameter that has a master: 16 bytes of what is kept in the compute type. Of eight elements
    // the low halves would not fit the registers.
    static constexpr int UNIT = 16 / sizeof(T);

    // How many elements have to be there for a thread to take that many: those of a warp where its lanes trade.
    static constexpr int WHOLE = VECTOR * sizeof(T) > 16 ? 32 * VECTOR : VECTOR;

    // The parameter is kept in fewer bits than it is computed in; only then there may be a master.
    static constexpr bool NARROW = sizeof(P) < sizeof(T), HALVED = MASTER_IS_HALVED<P>;

    // A chunk's own part of its row's arrays; null where the row has none and where this pass leaves it alone.
    struct Arrays {
        P* param;
        const G* grad;
        Master<P>* master;
        StateArrays<Rule, T, S> state;
        uint32_t place;  // of its first element in the row, with the row's key for rounding
    };

    template <class M>
    static __device__ M* part(void* column, int64_t offset) {
        return column == nullptr ? nullptr : static_cast<M*>(column) + offset;
    }

    static __device__ Arrays arrays(const Step& step, const Row& row, void* gradient, int64_t offset) {
        Arrays at;
        at.param = part<P>(row.column[PARAM], offset);
        at.grad = Rule::reads_gradient ? part<G>(gradient, offset) : nullptr;
        at.master = part<Master<P>>(row.column[MASTER], offset);
        at.state.slow = part<T>(row.column[SLOW], offset);
        at.state.companion = part<T>(row.column[COMPANION], offset);
        at.state.cached = part<S>(row.column[CACHED_MOMENT], offset);
        for (int m = 0; m < MOMENTS; ++m) at.state.moment[m] = part<S>(row.column[MOMENT + m], offset);
        if (!Rule::reads_gradient && !step.slow.acts_on_moment) at.state.moment[0] = nullptr;
        at.place = static_cast<uint32_t>(offset) + step.rounding;
        return at;
    }

    static __device__ bool aligned(const Arrays& at) {
        const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
        uintptr_t all = address(at.param) | address(at.grad) | address(at.master) | address(at.state.slow);
        all |= address(at.state.companion) | address(at.state.cached);
        for (int m = 0; m < MOMENTS; ++m) all |= address(at.state.moment[m]);
        return all % 16 == 0;
    }

    // What is not computed here and not changed here stays as it is, also where it was rounded.
    static __device__ bool changes_weights(const Step& step) { return Rule::reads_gradient || step.slow.restarts; }

    // The N elements from i on. Every condition on the way is the same for all threads of a block.
    template <int N>
    static __device__ __forceinline__ void elements(const Step& step, const Arrays& at, int i) {
        if constexpr (NARROW_STATE) {
            rounded_elements<N>(step, at, i);
        } else if constexpr (!NARROW) {
            // The gradient before the parameter: the other way round, fp64 Adam's registers spill on sm_120.
            Pack<G, N> grad{};
            if constexpr (Rule::reads_gradient) load<Reuse::NEXT_STEP>(grad, at.grad + i);
            Pack<T, N> p, g;
            for (int j = 0; j < N; ++j) g.element[j] = widen(grad.element[j]);
            load<Reuse::SOON>(p, at.param + i);
            Pack<T, N> moment[MOMENTS] = {};
            load_moments(at, i, moment);
            unit(step, at, i, p, g, moment);
            if (changes_weights(step)) store<Reuse::SOON>(at.param + i, p);
        } else {
            narrow_elements<N>(step, at, i);
        }
    }

    // What is narrower than the compute type is moved at once, the rest in units of 16 bytes: eight elements and their
    // moments in fp32 do not fit the registers. In a warp's access to a unit, were each lane to take the elements it
    // has of the parameter, every other 16 bytes would be left out, and every 32-byte sector be moved twice. So
    // neighbours trade halves, and two lanes take 32 bytes that lie together.
    template <int N>
    static __device__ __forceinline__ void narrow_elements(const Step& step, const Arrays& at, int i) {
        constexpr int UNIT = N * sizeof(T) > 16 ? Walk::UNIT : N;
        constexpr bool TRADED = UNIT < N;
        static_assert(!TRADED || N == 2 * UNIT, "two lanes trade halves");
        constexpr int STRIDE = TRADED ? N : UNIT;
        const int first = TRADED && threadIdx.x % 2 != 0 ? i - UNIT : i;
        constexpr bool NARROW_GRAD = sizeof(G) < sizeof(T);

        // Of a row that has low halves as many as are not traded.
        constexpr bool LOW = HALVED && !TRADED;
        const bool has_master = (LOW || !HALVED) && at.master != nullptr;
        Pack<P, N> param{};
        // Without a master zeros: then it is the parameter.
        Pack<LowHalf, LOW ? N : 1> low{};
        Pack<G, NARROW_GRAD ? N : UNIT> grad{};
        Pack<T, UNIT> p{}, moment[MOMENTS] = {};
        const auto load_unit = [&](int place) {
            if constexpr (Rule::reads_gradient && !NARROW_GRAD) load<Reuse::NEXT_STEP>(grad, at.grad + place);
            if constexpr (!HALVED) {
                if (has_master) load<Reuse::NEXT_STEP>(p, at.master + place);
            }
            load_moments(at, place, moment);
        };
        // All loads of the first unit before the trade, which waits for what it trades.
        if (HALVED || !has_master) load<Reuse::SOON>(param, at.param + i);
        if constexpr (LOW) {
            if (has_master) load<Reuse::NEXT_STEP>(low, at.master + i);
        }
        if constexpr (Rule::reads_gradient && NARROW_GRAD) load<Reuse::NEXT_STEP>(grad, at.grad + i);
        load_unit(first);
        if constexpr (TRADED) {
            if (HALVED || !has_master) trade_halves(param);
            if constexpr (Rule::reads_gradient && NARROW_GRAD) trade_halves(grad);
        }
#pragma unroll
        for (int u = 0; u < N / UNIT; ++u) {
            const int place = first + u * STRIDE;
            if (u > 0) load_unit(place);
            Pack<T, UNIT> g;
            for (int j = 0; j < UNIT; ++j) g.element[j] = widen(grad.element[NARROW_GRAD ? u * UNIT + j : j]);
            for (int j = 0; j < UNIT; ++j) {
                if constexpr (LOW) {
                    p.element[j] = join(param.element[u * UNIT + j], low.element[u * UNIT + j]);
                } else if (!has_master) {
                    p.element[j] = widen(param.element[u * UNIT + j]);
                }
            }
            unit(step, at, place, p, g, moment);
            if constexpr (!HALVED) {
                if (has_master && changes_weights(step)) store<Reuse::NEXT_STEP>(at.master + place, p);
            }
            for (int j = 0; j < UNIT; ++j) {
                if constexpr (LOW) {
                    if (has_master) {
                        halve(p.element[j], param.element[u * UNIT + j], low.element[u * UNIT + j]);
                        continue;
                    }
                }
                narrow(p.element[j], param.element[u * UNIT + j]);
            }
        }
        if (!changes_weights(step)) return;
        if constexpr (LOW) {
            if (has_master) store<Reuse::NEXT_STEP>(at.master + i, low);
        }
        if constexpr (TRADED) trade_halves(param);
        store<Reuse::SOON>(at.param + i, param);
    }

    // A chunk's elements, N at a time, as long as there are WHOLE of them; returns how many that were.
    template <int N, int WHOLE>
    static __device__ __forceinline__ int vectors(const Step& step, const Arrays& at, int count) {
        const int whole = N > 1 && aligned(at) ? count / WHOLE * WHOLE : 0;
        // Not unrolled: that costs registers, and what is resident elsewhere on the multiprocessor hides the latency.
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x) * N; i < whole; i += CHUNK_THREADS * N) elements<N>(step, at, i);
        return whole;
    }

    template <int N>
    static __device__ __forceinline__ void load_moments(const Arrays& at, int i, Pack<S, N> (&moment)[MOMENTS]) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (at.state.moment[m] != nullptr) load<Reuse::NEXT_STEP>(moment[m], at.state.moment[m] + i);
        }
    }

    template <int N>
    static __device__ __forceinline__ void store_moments(const Arrays& at, int i, const Pack<S, N> (&moment)[MOMENTS]) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (at.state.moment[m] != nullptr) store<Reuse::NEXT_STEP>(at.state.moment[m] + i, moment[m]);
        }
    }

    template <int N>
    static __device__ __forceinline__ void unit(const Step& step, const Arrays& at, int i, Pack<T, N>& p,
                                                const Pack<T, N>& g, Pack<T, N> (&moment)[MOMENTS]) {
        capture(step, at, i, p);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            T own[MOMENTS];
            for (int m = 0; m < MOMENTS; ++m) own[m] = moment[m].element[j];
            Rule::update(step.rule, p.element[j], g.element[j], own);
            for (int m = 0; m < MOMENTS; ++m) moment[m].element[j] = own[m];
        }
        // What becomes of the moments before what becomes of the weights: for both at once there are no registers.
        if (step.slow.due && at.state.moment[0] != nullptr) {
            T* const cache = at.state.cached;
            Pack<T, N> cached{};
            if (cache != nullptr) load<Reuse::NEXT_STEP>(cached, cache + i);
            for (int j = 0; j < N; ++j) step.slow.moment(moment[0].element[j], cached.element[j]);
            if (cache != nullptr) store<Reuse::NEXT_STEP>(cache + i, cached);
        }
        store_moments(at, i, moment);
        if (step.slow.due) event_of_weights(step, at, i, p);
    }

    template <int N>
    static __device__ __forceinline__ void capture(const Step& step, const Arrays& at, int i, const Pack<T, N>& p) {
        // In a first step that has an event too (k = 1), phi is read back from here: kept in registers, it would take
        // them from every step.
        if (step.slow.capture) store<Reuse::NEXT_STEP>(at.state.slow + i, p);
    }

    template <int N>
    static __device__ __forceinline__ void event_of_weights(const Step& step, const Arrays& at, int i, Pack<T, N>& p) {
        Pack<T, N> slow;
        load<Reuse::NEXT_STEP>(slow, at.state.slow + i);
        T* const momentum = at.state.companion;
        Pack<T, N> outer{};
        if (momentum != nullptr) load<Reuse::NEXT_STEP>(outer, momentum + i);
        for (int j = 0; j < N; ++j) step.slow.weights(p.element[j], slow.element[j], outer.element[j]);
        if (momentum != nullptr) store<Reuse::NEXT_STEP>(momentum + i, outer);
        store<Reuse::NEXT_STEP>(at.state.slow + i, slow);
    }

    // The N elements from i on of a row with narrow moments.
    template <int N>
    static __device__ __forceinline__ void rounded_elements(const Step& step, const Arrays& at, int i) {
        Pack<G, N> grad{};
        if constexpr (Rule::reads_gradient) load<Reuse::NEXT_STEP>(grad, at.grad + i);
        Pack<T, N> p{};
        Pack<P, N> param{};
        // Without a master zeros: then it is the parameter.
        Pack<LowHalf, HALVED ? N : 1> low{};
        const bool has_master = NARROW && at.master != nullptr;
        const bool has_whole = !HALVED && has_master;
        if constexpr (HALVED) {
            if (has_master) load<Reuse::NEXT_STEP>(low, at.master + i);
        } else if constexpr (NARROW) {
            if (has_master) load<Reuse::NEXT_STEP>(p, at.master + i);
        }
        if (!has_whole) load<Reuse::SOON>(param, at.param + i);
        Pack<S, N> moment[MOMENTS] = {}, cached{};
        load_moments(at, i, moment);
        const bool event_of_moment = step.slow.due && at.state.moment[0] != nullptr;
        const bool has_cached = event_of_moment && at.state.cached != nullptr;
        if (has_cached) load<Reuse::NEXT_STEP>(cached, at.state.cached + i);
        if (!has_whole) {
            for (int j = 0; j < N; ++j) {
                if constexpr (HALVED) {
                    p.element[j] = join(param.element[j], low.element[j]);
                } else {
                    p.element[j] = widen(param.element[j]);
                }
            }
        }
        capture(step, at, i, p);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            T own[MOMENTS], before = widen(cached.element[j]);
            for (int m = 0; m < MOMENTS; ++m) own[m] = widen(moment[m].element[j]);
            Rule::update(step.rule, p.element[j], static_cast<T>(widen(grad.element[j])), own);
            if (event_of_moment) step.slow.moment(own[0], before);
            narrow_moments(at, i, j, own, moment);
        }
        store_moments(at, i, moment);
        // Equal to the first moment, and by its draw.
        if (has_cached) store<Reuse::NEXT_STEP>(at.state.cached + i, moment[0]);
        if (step.slow.due) event_of_weights(step, at, i, p);
        if (!changes_weights(step)) return;
        if constexpr (!NARROW) {
            store<Reuse::SOON>(at.param + i, p);
        } else {
            for (int j = 0; j < N; ++j) narrow(p.element[j], param.element[j]);
            if constexpr (HALVED) {
                if (has_master) {
                    for (int j = 0; j < N; ++j) halve(p.element[j], param.element[j], low.element[j]);
                    store<Reuse::NEXT_STEP>(at.master + i, low);
                }
            } else {
                if (has_master) store<Reuse::NEXT_STEP>(at.master + i, p);
            }
            store<Reuse::SOON>(at.param + i, param);
        }
    }

    // The moments of element i + j.
    template <int N>
    static __device__ __forceinline__ void narrow_moments(const Arrays& at, int i, int j, const T (&moment)[MOMENTS],
                                                          Pack<S, N> (&narrow)[MOMENTS]) {
        const uint32_t random = mixed(at.place + static_cast<uint32_t>(i + j));
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) narrow_without_bias(moment[m], random_half(random, m), narrow[m].element[j]);
    }

    // Where the weights are in the compute type: a parameter that is kept in fewer bits has a master here.
    static __device__ T* kept_weights(const Arrays& at) {
        if constexpr (NARROW) {
            return at.master;
        } else {
            return at.param;
        }
    }

    // N weights of such a row.
    template <int N>
    static __device__ __forceinline__ void load_weights(const Arrays& at, int i, Pack<T, N>& p) {
        if constexpr (HALVED) {
            Pack<P, N> param;
            Pack<LowHalf, N> low;
            load<Reuse::SOON>(param, at.param + i);
            load<Reuse::SOON>(low, at.master + i);
            for (int j = 0; j < N; ++j) p.element[j] = join(param.element[j], low.element[j]);
        } else {
            load<Reuse::SOON>(p, kept_weights(at) + i);
        }
    }

    template <int N>
    static __device__ __forceinline__ void store_weights(const Arrays& at, int i, const Pack<T, N>& p) {
        Pack<P, N> param;
        if constexpr (HALVED) {
            Pack<LowHalf, N> low;
            for (int j = 0; j < N; ++j) halve(p.element[j], param.element[j], low.element[j]);
            store<Reuse::SOON>(at.master + i, low);
            store<Reuse::SOON>(at.param + i, param);
        } else {
            store<Reuse::SOON>(kept_weights(at) + i, p);
            if constexpr (NARROW) {
                for (int j = 0; j < N; ++j) narrow(p.element[j], param.element[j]);
                store<Reuse::SOON>(at.param + i, param);
            }
        }
    }

    // What a thread takes at a time of a row whose policy averages: 16 bytes of what is kept in the compute type. In
    // fp64 8 bytes: with x beside three moments two elements would not fit the registers.
    static constexpr int AVERAGED = sizeof(T) > sizeof(float) ? 1 : 16 / sizeof(T);

    // The N elements from i on of such a row, by a kernel of their own: x is held over the rule, and in the path above
    // it would take registers from every policy's step.
    template <int N>
    static __device__ __forceinline__ void averaged_elements(const Step& step, const Arrays& at, int i) {
        Pack<G, N> grad{};
        if constexpr (Rule::reads_gradient) load<Reuse::NEXT_STEP>(grad, at.grad + i);
        Pack<T, N> p, x{};
        Pack<S, N> moment[MOMENTS] = {};
        load_weights(at, i, p);
        if constexpr (Rule::reads_gradient) {
            Pack<T, N> z;
            if constexpr (HALVED) {
                load<Reuse::NEXT_STEP>(z, at.state.slow + i);
            } else {
                // By an address and not by a copy of y, which would wait for it before all is under way.
                load<Reuse::NEXT_STEP>(z, (step.slow.capture ? kept_weights(at) : at.state.slow) + i);
            }
            load_moments(at, i, moment);
            if (HALVED && step.slow.capture) z = p;
            for (int j = 0; j < N; ++j) {
                x.element[j] = step.slow.average(p.element[j], z.element[j]);
                p.element[j] = z.element[j];
            }
#pragma unroll
            for (int j = 0; j < N; ++j) {
                T own[MOMENTS];
                for (int m = 0; m < MOMENTS; ++m) own[m] = widen(moment[m].element[j]);
                Rule::update(step.rule, p.element[j], static_cast<T>(widen(grad.element[j])), own);
                if constexpr (NARROW_STATE) {
                    narrow_moments(at, i, j, own, moment);
                } else {
                    for (int m = 0; m < MOMENTS; ++m) moment[m].element[j] = own[m];
                }
            }
            store_moments(at, i, moment);
        } else {
            // Theta was put where z is for another optimizer's step, and x is kept.
            load<Reuse::NEXT_STEP>(x, at.state.companion + i);
        }
        store<Reuse::NEXT_STEP>(at.state.slow + i, p);
        for (int j = 0; j < N; ++j) {
            const T z = p.element[j];
            step.slow.averaged(p.element[j], z, x.element[j]);
        }
        if constexpr (!Rule::reads_gradient) store<Reuse::NEXT_STEP>(at.state.companion + i, x);
        store_weights(at, i, p);
    }
};

template <class Rule, class T>
__global__ void __launch_bounds__(ROW_THREADS) rows(Launch launch) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
    if (i >= launch.row_count || launch.gradients[i] == nullptr || skips_step(launch.arguments)) return;
    const Row& row = launch.rows[i];
    prepare(launch.policy, launch.groups[row.group], RowCounts::of(row), launch.arguments,
            static_cast<RowStep<Rule, T>*>(launch.steps)[i], [&](const PolicyNumbers& after) {
                if (launch.arguments.pass == Pass::STEP) advance(row, after);
            });
}

// Four blocks, 1024 threads, are resident on a multiprocessor: enough loads in flight to keep the memory busy.
template <class Rule, class P, class G, class S>
__global__ void __launch_bounds__(CHUNK_THREADS, 1024 / CHUNK_THREADS) chunks(Launch launch) {
    using Walk = Walk<Rule, P, G, S>;
    const Chunk chunk = launch.chunks[blockIdx.x];
    void* const gradient = launch.gradients[chunk.row];
    if (gradient == nullptr || skips_step(launch.arguments)) return;

    // In shared memory and not in each thread's registers, which it would fill by half.
    __shared__ typename Walk::Step step;
    __shared__ typename Walk::Arrays at;
    if (threadIdx.x == 0) {
        step = static_cast<const typename Walk::Step*>(launch.steps)[chunk.row];
        at = Walk::arrays(step, launch.rows[chunk.row], gradient, chunk.offset);
    }
    __syncthreads();
    if (!Rule::reads_gradient && !step.slow.due) return;

    int whole;
    if (Walk::HALVED && at.master != nullptr) {
        whole = Walk::template vectors<Walk::UNIT, Walk::UNIT>(step, at, chunk.count);
    } else {
        whole = Walk::template vectors<Walk::VECTOR, Walk::WHOLE>(step, at, chunk.count);
    }
#pragma unroll 1
    for (int i = whole + static_cast<int>(threadIdx.x); i < chunk.count; i += CHUNK_THREADS) {
        Walk::template elements<1>(step, at, i);
    }
}

// The same for a policy that averages.
template <class Rule, class P, class G, class S>
__global__ void __launch_bounds__(CHUNK_THREADS, 1024 / CHUNK_THREADS) averaged(Launch launch) {
    using Walk = Walk<Rule, P, G, S>;
    const Chunk chunk = launch.chunks[blockIdx.x];
    void* const gradient = launch.gradients[chunk.row];
    if (gradient == nullptr || skips_step(launch.arguments)) return;

    // In shared memory and not in each thread's registers, which it would fill by half.
    __shared__ typename Walk::Step step;
    __shared__ typename Walk::Arrays at;
    if (threadIdx.x == 0) {
        step = static_cast<const typename Walk::Step*>(launch.steps)[chunk.row];
        at = Walk::arrays(step, launch.rows[chunk.row], gradient, chunk.offset);
    }
    __syncthreads();

    constexpr int N = Walk::AVERAGED;
    const int whole = N > 1 && Walk::aligned(at) ? chunk.count / N * N : 0;
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = thread * N; i < whole; i += CHUNK_THREADS * N) Walk::template averaged_elements<N>(step, at, i);
#pragma unroll 1
    for (int i = whole + thread; i < chunk.count; i += CHUNK_THREADS) {
        Walk::template averaged_elements<1>(step, at, i);
    }
}

template <class Rule, class P, class G, class S>
const Kernel* kernel() {
    using T = Compute<P>;
    static constexpr Kernel kernel{
        Rule::name,
        DtypeOf<P>::name,
        Rule::reads_gradient && !std::is_same_v<P, G> ? DtypeOf<G>::name : nullptr,
        std::is_same_v<S, T> ? nullptr : DtypeOf<S>::name,
        sizeof(RowStep<Rule, T>),
        Rule::reads_gradient,
        [](const Launch& arguments, unsigned blocks, cudaStream_t stream) {
            return launch(&rows<Rule, T>, blocks, ROW_THREADS, stream, arguments);
        },
        [](const Launch& arguments, unsigned blocks, cudaStream_t stream) {
            const bool averaging = averages(Policies{}, arguments.policy);
            if constexpr (std::is_same_v<S, Code>) {
                const ElementTypes types{DtypeOf<P>::value, DtypeOf<G>::value};
                const auto walk = averaging ? &coded_averaged<Rule> : &coded<Rule>;
                return launch(walk, blocks, CHUNK_THREADS, stream, arguments, types);
            } else {
                const auto walk = averaging ? &averaged<Rule, P, G, S> : &chunks<Rule, P, G, S>;
                return launch(walk, blocks, CHUNK_THREADS, stream, arguments);
            }
        },
        [] {
            cudaFuncAttributes attributes;
            const auto load = [&](const auto... kernels) {
                cudaError_t error = cudaSuccess;
                ((error = error == cudaSuccess ? cudaFuncGetAttributes(&attributes, kernels) : error), ...);
                return error;
            };
            if constexpr (std::is_same_v<S, Code>) {
                return load(&rows<Rule, T>, &coded<Rule>, &coded_averaged<Rule>);
            } else {
                return load(&rows<Rule, T>, &chunks<Rule, P, G, S>, &averaged<Rule, P, G, S>);
            }
        }};
    return &kernel;
}

}  // namespace LF_ISA

template <class Rule, bool FP64>
const Kernel* find_walk(Dtype param, Dtype grad, Dtype state) {
    const Kernel* found = nullptr;
    with_walk<Rule>(param, grad, state, [&](auto pattern) {
        using P = typename decltype(pattern)::Param;
        using G = typename decltype(pattern)::Grad;
        using S = typename decltype(pattern)::State;
        if constexpr (std::is_same_v<Compute<P>, double> == FP64) found = kernel<Rule, P, G, S>();
    });
    return found;
}

}  // namespace lookahead_fused
