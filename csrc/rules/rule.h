// What a rule is told besides its hyperparameters, and the part of the gradient's treatment all rules share.
//
// A rule is a struct of static members:
//   name
//   reads_gradient          false where the inner step is done elsewhere
//   Hyper, hyper_names      its hyperparameters, in the order in which Python writes them into a Group
//   Moment, moment_names    its state, in the order of a Row's moment columns, null where a row has none; number 0 is
//                           the first moment, the one that a policy acts on
//   squares                 which moments are means of squares, and never negative: number 0 is not
//   Coefficients<T>         what one element's update needs, rounded to the compute type
//   prepare<T>(hyper, at)   the fp64 part of a step, done once for a parameter; what `at` has of the hyperparameters
//                           is read there
//   update(c, p, g, moment) the step of one element, all values in registers
#pragma once

#include "numeric.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct StepInputs {
    int64_t step;         // applied updates of this parameter, this one counted
    double lr;            // the group's learning rate and weight decay, read from their tensors where they are any
    double weight_decay;  // 0 where the inner step is done elsewhere
    double grad_scale;    // what an AMP loss scaler multiplied the gradients by; 1 without one
    double clip;          // what a clip by the global norm multiplies them by; 1 without one
    int32_t first;        // this is the parameter's first update, and its moments were not loaded
};

LF_HD double gradient_factor(bool maximize, const StepInputs& at) {
    const double factor = 1.0 / at.grad_scale * at.clip;
    return maximize ? -factor : factor;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
