// The sum of the squares of all gradients, in one written order: the same bits whatever the threads, chunks, devices
// and instruction sets.
//
// A row is cut into blocks of NORM_BLOCK elements. Of a block, lane l of NORM_LANES adds the squares of the elements l,
// l + NORM_LANES, ... one after the other; then the lanes are added by halves. The blocks of a row are added in the
// same manner, and so are the rows of an optimizer, in the order of its parameters. All of it is fp64, in which the
// square of an fp32 number is exact.
#pragma once

#include <cstdint>

#include "../rules/numeric.h"

namespace lookahead_fused {

constexpr int NORM_LANES = 64;
constexpr int64_t NORM_BLOCK = 4096;

constexpr int64_t norm_blocks(int64_t numel) { return (numel + NORM_BLOCK - 1) / NORM_BLOCK; }

inline namespace LF_ISA {

// Lane l and lane l + 32, of these lane l and lane l + 16, and so on.
LF_HD double sum_of_lanes(double* lanes) {
    for (int width = NORM_LANES / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] = lanes[lane] + lanes[lane + width];
    }
    return lanes[0];
}

inline double sum_in_lanes(const double* values, int64_t count) {
    // Of one value the lanes make that value.
    if (count == 1) return values[0];
    double lanes[NORM_LANES] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i % NORM_LANES] += values[i];
    return sum_of_lanes(lanes);
}

// What a clip by the global norm is made of, and where it goes. Every address is the device's.
struct ClipArguments {
    const double* sums;  // of each parameter
    int64_t count;
    const float* grad_scale;  // null, or what the gradients were multiplied by
    const float* found_inf;   // null, or non-zero: the step is skipped whatever the norm
    double* clip;             // gets the norm and the coefficient, and has the largest norm, infinity where none is
    float* skip;              // null, or gets whether the step is skipped, also where the norm is not finite
    int64_t* skipped;         // null, or counts where the norm is not finite
};

// By the difference that it makes to itself, which is NaN for what is not finite.
LF_HD bool is_finite(double x) { return x - x == 0.0; }

// The norm is of the unscaled gradients, and the coefficient what torch.nn.utils.clip_grad_norm_ multiplies them by.
LF_HD void write_clip(const ClipArguments& to, double sum_of_squares) {
    const double norm = square_root(sum_of_squares) / (to.grad_scale != nullptr ? *to.grad_scale : 1.0);
    const double ratio = to.clip[2] / (norm + 1e-6);
    to.clip[0] = norm;
    // A NaN stays one.
    to.clip[1] = ratio > 1.0 ? 1.0 : ratio;
    if (to.skip == nullptr) return;
    const bool finite = is_finite(norm);
    *to.skip = !finite || (to.found_inf != nullptr && *to.found_inf != 0.0f) ? 1.0f : 0.0f;
    if (!finite) *to.skipped += 1;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
