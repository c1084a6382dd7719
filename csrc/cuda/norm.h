// The squares of a table's gradients on an NVIDIA GPU, and what a clip comes to: two launches before a step's own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../table/norm.h"
#include "../table/table.h"
#include "runtime.h"

namespace lookahead_fused {

// Every address is the device's.
struct SquaresLaunch {
    const Chunk* blocks;  // as the four after it table/norm_plan.h has it
    int64_t block_count;
    const int64_t* first_block;
    unsigned* done;
    double* partial;
    void* const* gradients;
    const int64_t* places;  // of each row's sum
    double* sums;
};

cudaError_t launch_squares(Dtype grad, const SquaresLaunch& launch, cudaStream_t stream);
cudaError_t launch_clip(const ClipArguments& launch, cudaStream_t stream);

// Brings the kernels onto the current device, which otherwise happens in the first launch.
cudaError_t load_norm(Dtype grad);

}  // namespace lookahead_fused
