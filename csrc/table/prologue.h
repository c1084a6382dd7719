// The part of a step that is done once for a parameter, before any element is touched: advance its step counter,
// decide on the policy's event, and turn hyperparameters into the coefficients of its elements. One statement for host
// and device.
#pragma once

#include "../rules/all.h"
#include "../slow/all.h"
#include "table.h"

namespace lookahead_fused {
inline namespace LF_ISA {

template <class Rule, class T>
struct RowStep {
    typename Rule::template Coefficients<T> rule;
    SlowStep<T> slow;
};

// The columns from STATE on that a rule's walk has to do with end before this one.
template <class Rule>
constexpr int STATE_END = MOMENT + static_cast<int>(Rule::MOMENTS);

// With an overflow among the gradients nothing at all changes, not even a counter.
LF_HD bool skips_step(const StepArguments& arguments) {
    return arguments.found_inf != nullptr && *arguments.found_inf != 0.0f;
}

LF_HD bool takes_part(const Row& row, Pass pass) { return pass == Pass::SYNC || row.column[GRAD] != nullptr; }

// What decides the coefficients of a row's next update, besides its group.
struct RowCounts {
    int64_t applied;     // updates so far; the counter itself is the caller's to advance
    int64_t made_after;  // how many there were when the slow weights were made
    int32_t moments_loaded;

    LF_HD static RowCounts of(const Row& row) {
        const double* const made_after = static_cast<const double*>(row.column[AVERAGE_START]);
        return {static_cast<int64_t>(*static_cast<const double*>(row.column[STEP])),
                made_after == nullptr ? 0 : static_cast<int64_t>(*made_after), row.moments_loaded};
    }
    LF_HD bool operator==(const RowCounts& other) const {
        return applied == other.applied && made_after == other.made_after && moments_loaded == other.moments_loaded;
    }
};

// The coefficients of a row's next update. The policy's are written before the rule's are made: a GPU's registers do
// not hold both.
template <class Rule, class T>
LF_HD void prepare(int32_t policy, const Group& group, const RowCounts& counts, const StepArguments& arguments,
                   RowStep<Rule, T>& to) {
    PolicyInputs slow;
    slow.step = counts.applied + 1;
    slow.made_after = counts.made_after;
    // Where the inner step was done elsewhere, theta has moved already, and phi was taken before that.
    slow.captures = Rule::reads_gradient && counts.applied == 0;
    slow.event = arguments.pass == Pass::STEP ? (arguments.event_later != 0 ? Event::NEVER : Event::BY_COUNT)
                 : counts.applied > 0         ? Event::NOW
                                              : Event::NEVER;

    to.slow = prepare_slow<T>(Policies{}, policy, group.policy, slow);

    StepInputs at;
    at.step = counts.applied + 1;
    at.lr = group.rule[0];
    if (group.lr != nullptr) {
        at.lr = group.lr_is_double ? *static_cast<const double*>(group.lr) : *static_cast<const float*>(group.lr);
    }
    at.grad_scale = arguments.grad_scale != nullptr ? *arguments.grad_scale : 1.0;
    at.first = counts.applied == 0 && counts.moments_loaded == 0;
    to.rule = Rule::template prepare<T>(group.rule, at);
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
