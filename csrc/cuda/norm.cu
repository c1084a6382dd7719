#include "cuda/norm.h"

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "table/norm.h"

namespace lookahead_fused {
inline namespace LF_ISA {

// The sum over a block's threads, a lane each, in the first of them.
__device__ __forceinline__ double sum_over_threads(double* lanes, double own) {
    const int lane = static_cast<int>(threadIdx.x);
    lanes[lane] = own;
    __syncthreads();
    for (int width = NORM_LANES / 2; width > 0; width /= 2) {
        if (lane < width) lanes[lane] = lanes[lane] + lanes[lane + width];
        __syncthreads();
    }
    return lanes[0];
}

// The block that comes last of its row adds what all of them have left.
template <class G>
__global__ void __launch_bounds__(NORM_LANES) squares(SquaresLaunch launch) {
    __shared__ double lanes[NORM_LANES];
    __shared__ bool last;
    const Chunk block = launch.blocks[blockIdx.x];
    const auto* const gradient = static_cast<const G*>(launch.gradients[block.row]);
    const int lane = static_cast<int>(threadIdx.x);
    double* const sum = launch.sums + launch.places[block.row];
    if (gradient == nullptr) {
        if (block.offset == 0 && lane == 0) *sum = 0.0;
        return;
    }
    double own = 0.0;
    // Neighbouring threads take neighbouring elements, and there are enough of them to keep the memory busy: nothing is
    // won by wider accesses.
#pragma unroll 16
    for (int i = lane; i < block.count; i += NORM_LANES) {
        Pack<G, 1> element;
        load<Reuse::SOON>(element, gradient + block.offset + i);
        const double value = widen(element.element[0]);
        own = own + value * value;
    }
    const double total = sum_over_threads(lanes, own);
    const int64_t first = launch.first_block[block.row], count = launch.first_block[block.row + 1] - first;
    if (count == 1) {
        if (lane == 0) *sum = total;
        return;
    }
    if (lane == 0) {
        launch.partial[blockIdx.x] = total;
        __threadfence();
        last = atomicAdd(launch.done + block.row, 1u) + 1 == count;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    own = 0.0;
    // Not through the multiprocessor's own cache, which may hold what lay there before.
    for (int64_t i = lane; i < count; i += NORM_LANES) own = own + __ldcg(launch.partial + first + i);
    const double all = sum_over_threads(lanes, own);
    if (lane == 0) {
        *sum = all;
        launch.done[block.row] = 0;
    }
}

__global__ void __launch_bounds__(NORM_LANES) clip(ClipArguments launch) {
    __shared__ double lanes[NORM_LANES];
    double own = 0.0;
    for (int64_t i = threadIdx.x; i < launch.count; i += NORM_LANES) own = own + launch.sums[i];
    const double sum = sum_over_threads(lanes, own);
    if (threadIdx.x != 0) return;
    write_clip(launch, sum);
}

template <class Visit>
cudaError_t with_squares(Dtype grad, Visit visit) {
    cudaError_t error = cudaErrorInvalidValue;
    Dtypes::any([&](auto dtype) {
        using Of = decltype(dtype);
        if (Of::value != grad) return false;
        error = visit(&squares<typename Of::Type>);
        return true;
    });
    return error;
}

}  // namespace LF_ISA

cudaError_t launch_squares(Dtype grad, const SquaresLaunch& arguments, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(arguments.block_count);
    return with_squares(grad, [&](auto kernel) { return launch(kernel, blocks, NORM_LANES, stream, arguments); });
}

cudaError_t launch_clip(const ClipArguments& arguments, cudaStream_t stream) {
    return launch(&clip, 1, NORM_LANES, stream, arguments);
}

cudaError_t load_norm(Dtype grad) {
    cudaFuncAttributes attributes;
    const cudaError_t error =
        with_squares(grad, [&](auto kernel) { return cudaFuncGetAttributes(&attributes, kernel); });
    return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, &clip);
}

}  // namespace lookahead_fused
