// The part of a step that is done once for a parameter, before any element is touched: advance its step counter,
// decide on the sync, and turn hyperparameters into the coefficients of its elements. One statement for host and
// device.
#pragma once

#include <type_traits>

#include "../rules/rule.h"
#include "../rules/sync.h"
#include "table.h"

namespace lookahead_fused {
inline namespace LF_ISA {

// What a parameter of type P is computed in: fp64 in fp64, all else in fp32.
template <class P>
using Compute = std::conditional_t<std::is_same_v<P, double>, double, float>;

template <class Rule, class T>
struct RowStep {
    typename Rule::template Coefficients<T> rule;
    Sync<T> sync;
    uint32_t moments;  // bit i: MOMENT + i is read and written
};

// Whether this step changes anything at all. With an overflow among the gradients nothing does, not even a counter.
LF_HD bool holds(const StepArguments& arguments) {
    return arguments.found_inf != nullptr && *arguments.found_inf != 0.0f;
}

LF_HD bool takes_part(const Row& row) { return row.column[GRAD] != nullptr; }

// The coefficients of the update that follows `applied` updates; the counter itself is the caller's to advance.
template <class Rule, class T>
LF_HD RowStep<Rule, T> prepare(const Group& group, int64_t applied, bool moments_loaded,
                               const StepArguments& arguments) {
    StepInputs at;
    at.step = applied + 1;
    at.lr = group.hyper[0];
    if (group.lr != nullptr) {
        at.lr = group.lr_is_double ? *static_cast<const double*>(group.lr) : *static_cast<const float*>(group.lr);
    }
    at.grad_scale = arguments.grad_scale != nullptr ? *arguments.grad_scale : 1.0;
    at.first = applied == 0 && !moments_loaded;

    RowStep<Rule, T> step;
    step.rule = Rule::template prepare<T>(group.hyper, at);
    step.moments = Rule::moments(group.hyper);
    step.sync.alpha = Lerp<T>::with(group.alpha);
    step.sync.due = at.step % group.k == 0;
    // Where the inner step was done elsewhere, theta has moved already, and phi was taken before that.
    step.sync.capture = Rule::reads_gradient && applied == 0;
    step.sync.pullback = group.pullback;
    return step;
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
