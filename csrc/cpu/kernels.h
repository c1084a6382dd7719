// What an instruction set's translation unit gives out: for a rule and a pattern of dtypes the two functions of a pass,
// and for a gradient's dtype the one of a norm.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../table/table.h"

namespace lookahead_fused {

struct Kernel {
    // Advances the step counter of every row that takes part and writes the coefficients of the rows' updates into
    // steps (row_count times step_bytes at most), and into step_of_row which of them is each row's, negative where a
    // row takes no part.
    void (*rows)(const Table& table, const StepArguments& arguments, void* steps, int32_t* step_of_row);
    // Updates the elements of chunks [begin, end).
    void (*chunks)(const Table& table, const void* steps, const int32_t* step_of_row, int64_t begin, int64_t end);
    size_t step_bytes;
};

// What a walk file gives out. In a wheel for several Pythons the walks are a library of their own, and this is what it
// shows: nothing of C++'s library crosses.
#pragma GCC visibility push(default)

// Null where there is no such walk.
using FindKernel = const Kernel* (*)(const char* rule, Dtype param, Dtype grad, Dtype state);

const Kernel* find_baseline(const char* rule, Dtype param, Dtype grad, Dtype state);
#if LOOKAHEAD_FUSED_X86
const Kernel* find_avx2(const char* rule, Dtype param, Dtype grad, Dtype state);
const Kernel* find_avx512(const char* rule, Dtype param, Dtype grad, Dtype state);
#endif

// The sum of the squares of up to NORM_BLOCK elements from `offset` on, in the order that table/norm.h states.
using SquaresOfBlock = double (*)(const void* gradient, int64_t offset, int count);
using FindSquares = SquaresOfBlock (*)(Dtype grad);

SquaresOfBlock squares_baseline(Dtype grad);
#if LOOKAHEAD_FUSED_X86
SquaresOfBlock squares_avx2(Dtype grad);
SquaresOfBlock squares_avx512(Dtype grad);
#endif

#pragma GCC visibility pop

}  // namespace lookahead_fused
