// What a rule's translation unit gives out: for a pattern of dtypes, the two launches of a pass. nvcc's host compiler
// may be another than the one of all other files, with another standard library: none of its classes stands in here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../table/table.h"
#include "runtime.h"

namespace lookahead_fused {

// The argument of both kernels; every address is the device's.
struct Launch {
    int32_t policy;
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
    // By their names, for errors; grad is null where it is as param, state where it is what is computed in.
    const char *rule, *param, *grad, *state;
    size_t step_bytes;
    bool reads_gradient;
    // Advances the step counter of every row that takes part and writes the coefficients of its update.
    cudaError_t (*launch_rows)(const Launch& launch, unsigned blocks, cudaStream_t stream);
    // Updates the elements of every chunk.
    cudaError_t (*launch_chunks)(const Launch& launch, unsigned blocks, cudaStream_t stream);
    // Brings the kernels onto the current device, which otherwise happens in the first launch.
    cudaError_t (*load)();
};

// Defined for each rule in a file of its own (walk.cu.in), and for the parameters that are computed in fp64 apart from
// the others. Null where there is no such walk.
template <class Rule, bool FP64>
const Kernel* find_walk(Dtype param, Dtype grad, Dtype state);

}  // namespace lookahead_fused
