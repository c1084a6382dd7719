// The walk over a table on an NVIDIA GPU: a thread for each row, then a block for each chunk.
//
// Nothing a step decides comes back to the host: the step counters, the sync and what found_inf holds back are read
// and written here. This file is compiled once for each rule.
#pragma once

#define LF_ISA cuda

#include "runtime.h"

#include "../rules/adam.h"
#include "../rules/sgd.h"
#include "../rules/sync.h"
#include "../table/prologue.h"
#include "../table/table.h"
#include "kernels.h"
#include "memory.cuh"

namespace lookahead_fused {
inline namespace LF_ISA {

// P is the parameter's type in memory, G the gradient's.
template <class Rule, class P, class G>
struct Walk {
    using T = Compute<P>;
    using Step = RowStep<Rule, T>;
    static constexpr int MOMENTS = Rule::MOMENTS;

    // What a thread takes at a time: 16 bytes of the parameter. Not of fp64 parameters with fp32 gradients, a rare pair
    // whose conversions would not fit the registers: 8 bytes.
    static constexpr int VECTOR = sizeof(G) < sizeof(P) ? 1 : 16 / sizeof(P);

    // How many elements have to be there for a thread to take that many: those of a warp where its lanes trade.
    static constexpr int WHOLE = VECTOR * sizeof(T) > 16 ? 32 * VECTOR : VECTOR;

    // The parameter is kept in fewer bits than it is computed in; only then there may be a master.
    static constexpr bool NARROW = sizeof(P) < sizeof(T);

    // A chunk's own part of its row's arrays; null where the row has none.
    struct Arrays {
        P* param;
        const G* grad;
        T* master;
        T* slow;
        T* slow_moment;
        T* moment[MOMENTS];
    };

    template <class M>
    static __device__ M* part(void* column, int64_t offset) {
        return column == nullptr ? nullptr : static_cast<M*>(column) + offset;
    }

    static __device__ Arrays arrays(const Row& row, void* gradient, int64_t offset) {
        Arrays at;
        at.param = part<P>(row.column[PARAM], offset);
        at.grad = Rule::reads_gradient ? part<G>(gradient, offset) : nullptr;
        at.master = part<T>(row.column[MASTER], offset);
        at.slow = part<T>(row.column[SLOW], offset);
        at.slow_moment = part<T>(row.column[SLOW_MOMENT], offset);
        for (int i = 0; i < MOMENTS; ++i) at.moment[i] = part<T>(row.column[MOMENT + i], offset);
        return at;
    }

    static __device__ bool aligned(const Arrays& at) {
        const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
        uintptr_t all =
            address(at.param) | address(at.grad) | address(at.master) | address(at.slow) | address(at.slow_moment);
        for (int i = 0; i < MOMENTS; ++i) all |= address(at.moment[i]);
        return all % 16 == 0;
    }

    // The N elements from i on. Every condition on the way is the same for all threads of a block.
    template <int N>
    static __device__ __forceinline__ void elements(const Step& step, const Arrays& at, int i) {
        if constexpr (!NARROW) {
            // The gradient before the parameter: the other way round, fp64 Adam's registers spill on sm_120.
            Pack<G, N> grad{};
            if constexpr (Rule::reads_gradient) load<Reuse::NEXT_STEP>(grad, at.grad + i);
            Pack<T, N> p, g;
            for (int j = 0; j < N; ++j) g.element[j] = widen(grad.element[j]);
            load<Reuse::SOON>(p, at.param + i);
            Pack<T, N> moment[MOMENTS] = {};
            load_moments(step, at, i, moment);
            unit(step, at, i, p, g, moment);
            store<Reuse::SOON>(at.param + i, p);
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
        constexpr int UNIT = N * sizeof(T) > 16 ? 16 / sizeof(T) : N;
        constexpr bool TRADED = UNIT < N;
        static_assert(!TRADED || N == 2 * UNIT, "two lanes trade halves");
        constexpr int STRIDE = TRADED ? N : UNIT;
        const int first = TRADED && threadIdx.x % 2 != 0 ? i - UNIT : i;
        constexpr bool NARROW_GRAD = sizeof(G) < sizeof(T);

        Pack<P, N> param{};
        Pack<G, NARROW_GRAD ? N : UNIT> grad{};
        Pack<T, UNIT> p{}, moment[MOMENTS] = {};
        const auto load_unit = [&](int place) {
            if constexpr (Rule::reads_gradient && !NARROW_GRAD) load<Reuse::NEXT_STEP>(grad, at.grad + place);
            if (at.master != nullptr) load<Reuse::NEXT_STEP>(p, at.master + place);
            load_moments(step, at, place, moment);
        };
        // All loads of the first unit before the trade, which waits for what it trades.
        if (at.master == nullptr) load<Reuse::SOON>(param, at.param + i);
        if constexpr (Rule::reads_gradient && NARROW_GRAD) load<Reuse::NEXT_STEP>(grad, at.grad + i);
        load_unit(first);
        if constexpr (TRADED) {
            if (at.master == nullptr) trade_halves(param);
            if constexpr (Rule::reads_gradient && NARROW_GRAD) trade_halves(grad);
        }
#pragma unroll
        for (int u = 0; u < N / UNIT; ++u) {
            const int place = first + u * STRIDE;
            if (u > 0) load_unit(place);
            Pack<T, UNIT> g;
            for (int j = 0; j < UNIT; ++j) g.element[j] = widen(grad.element[NARROW_GRAD ? u * UNIT + j : j]);
            if (at.master == nullptr) {
                for (int j = 0; j < UNIT; ++j) p.element[j] = widen(param.element[u * UNIT + j]);
            }
            unit(step, at, place, p, g, moment);
            if (at.master != nullptr) store<Reuse::NEXT_STEP>(at.master + place, p);
            for (int j = 0; j < UNIT; ++j) narrow(p.element[j], param.element[u * UNIT + j]);
        }
        if constexpr (TRADED) trade_halves(param);
        store<Reuse::SOON>(at.param + i, param);
    }

    template <int N>
    static __device__ __forceinline__ void load_moments(const Step& step, const Arrays& at, int i,
                                                        Pack<T, N> (&moment)[MOMENTS]) {
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (step.moments >> m & 1) load<Reuse::NEXT_STEP>(moment[m], at.moment[m] + i);
        }
    }

    template <int N>
    static __device__ __forceinline__ void unit(const Step& step, const Arrays& at, int i, Pack<T, N>& p,
                                                const Pack<T, N>& g, Pack<T, N> (&moment)[MOMENTS]) {
        // In a first step that is a sync too (k = 1), phi is read back from here: kept in registers, it would take them
        // from every step.
        if (step.sync.capture) store<Reuse::NEXT_STEP>(at.slow + i, p);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            T own[MOMENTS];
            for (int m = 0; m < MOMENTS; ++m) own[m] = moment[m].element[j];
            Rule::update(step.rule, p.element[j], g.element[j], own);
            for (int m = 0; m < MOMENTS; ++m) moment[m].element[j] = own[m];
        }
        if (step.sync.due) {
            Pack<T, N> slow;
            load<Reuse::NEXT_STEP>(slow, at.slow + i);
            for (int j = 0; j < N; ++j) step.sync.weights(p.element[j], slow.element[j]);
            store<Reuse::NEXT_STEP>(at.slow + i, slow);
            if (step.moments & 1) {
                const bool cached = step.sync.pullback == PULLBACK_INTERPOLATE;
                Pack<T, N> slow_moment{};
                if (cached) load<Reuse::NEXT_STEP>(slow_moment, at.slow_moment + i);
                for (int j = 0; j < N; ++j) step.sync.moment(moment[0].element[j], slow_moment.element[j]);
                if (cached) store<Reuse::NEXT_STEP>(at.slow_moment + i, slow_moment);
            }
        }
#pragma unroll
        for (int m = 0; m < MOMENTS; ++m) {
            if (step.moments >> m & 1) store<Reuse::NEXT_STEP>(at.moment[m] + i, moment[m]);
        }
    }
};

template <class Rule, class T>
__global__ void __launch_bounds__(ROW_THREADS) rows(Launch launch) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * ROW_THREADS + threadIdx.x;
    if (i >= launch.row_count || launch.gradients[i] == nullptr || holds(launch.arguments)) return;
    const Row& row = launch.rows[i];
    double& counter = *static_cast<double*>(row.column[STEP]);
    const double applied = counter;
    static_cast<RowStep<Rule, T>*>(launch.steps)[i] = prepare<Rule, T>(
        launch.groups[row.group], static_cast<int64_t>(applied), row.moments_loaded != 0, launch.arguments);
    counter = applied + 1.0;
}

// Four blocks, 1024 threads, are resident on a multiprocessor: enough loads in flight to keep the memory busy.
template <class Rule, class P, class G>
__global__ void __launch_bounds__(CHUNK_THREADS, 1024 / CHUNK_THREADS) chunks(Launch launch) {
    using Walk = Walk<Rule, P, G>;
    const Chunk chunk = launch.chunks[blockIdx.x];
    void* const gradient = launch.gradients[chunk.row];
    if (gradient == nullptr || holds(launch.arguments)) return;

    // In shared memory and not in each thread's registers, which it would fill by half.
    __shared__ typename Walk::Step step;
    __shared__ typename Walk::Arrays at;
    if (threadIdx.x == 0) {
        step = static_cast<const typename Walk::Step*>(launch.steps)[chunk.row];
        at = Walk::arrays(launch.rows[chunk.row], gradient, chunk.offset);
    }
    __syncthreads();
    if (!Rule::reads_gradient && !step.sync.due) return;

    const int vectored = Walk::VECTOR > 1 && Walk::aligned(at) ? chunk.count / Walk::WHOLE * Walk::WHOLE : 0;
    const int thread = static_cast<int>(threadIdx.x);
    // Not unrolled: that costs registers, and what is resident elsewhere on the multiprocessor hides the latency.
#pragma unroll 1
    for (int i = thread * Walk::VECTOR; i < vectored; i += CHUNK_THREADS * Walk::VECTOR) {
        Walk::template elements<Walk::VECTOR>(step, at, i);
    }
#pragma unroll 1
    for (int i = vectored + thread; i < chunk.count; i += CHUNK_THREADS) Walk::template elements<1>(step, at, i);
}

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), unsigned blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Rule, class P, class G>
const Kernel* kernel(const char* name) {
    using T = Compute<P>;
    static const Kernel kernel{
        name,
        sizeof(RowStep<Rule, T>),
        Rule::reads_gradient,
        [](const Launch& arguments, unsigned blocks, cudaStream_t stream) {
            return launch(&rows<Rule, T>, blocks, ROW_THREADS, stream, arguments);
        },
        [](const Launch& arguments, unsigned blocks, cudaStream_t stream) {
            return launch(&chunks<Rule, P, G>, blocks, CHUNK_THREADS, stream, arguments);
        },
        [] {
            cudaFuncAttributes attributes;
            const cudaError_t error = cudaFuncGetAttributes(&attributes, &rows<Rule, T>);
            return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, &chunks<Rule, P, G>);
        }};
    return &kernel;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
