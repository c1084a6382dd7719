// What a rule's translation unit gives out: for a dtype pattern, the two launches of a step.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../table/table.h"
#include "runtime.h"

namespace lookahead_fused {

// The argument of both kernels; every address is the device's.
struct Launch {
    const Row* rows;  // but for their GRAD column, which moves more often than all else: that is `gradients`
    int64_t row_count;
    const Group* groups;
    void* const* gradients;
    const Chunk* chunks;
    int64_t chunk_count;
    void* steps;  // room for a row's coefficients, row_count times step_bytes
    StepArguments arguments;
};

constexpr int ROW_THREADS = 128;    // one for each row
constexpr int CHUNK_THREADS = 256;  // a block for each chunk

struct Kernel {
    const char* name;
    size_t step_bytes;
    bool reads_gradient;
    // Advances the step counter of every row and writes the coefficients of its update.
    cudaError_t (*launch_rows)(const Launch& launch, unsigned blocks, cudaStream_t stream);
    // Updates the elements of every chunk.
    cudaError_t (*launch_chunks)(const Launch& launch, unsigned blocks, cudaStream_t stream);
    // Brings both kernels onto the current device, which otherwise happens in the first launch.
    cudaError_t (*load)();
};

// Null where the rule has no walk for the dtypes.
const Kernel* find_adam(Dtype param, Dtype grad);
const Kernel* find_adam_fp64(Dtype param, Dtype grad);
const Kernel* find_sgd(Dtype param, Dtype grad);
const Kernel* find_sync(Dtype param);

}  // namespace lookahead_fused
