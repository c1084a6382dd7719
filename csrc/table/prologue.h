// The part of a step that is done once for a parameter, before any element is touched: advance its step counter,
// decide on the policy's event, and turn hyperparameters into the coefficients of its elements. One statement for host
// and device.
#pragma once

#include "../rules/all.h"
#include "../slow/all.h"
#include "../state/bfloat16.h"
#include "table.h"

namespace lookahead_fused {
inline namespace LF_ISA {

template <class Rule, class T>
struct RowStep {
    typename Rule::template Coefficients<T> rule;
    SlowStep<T> slow;
    uint32_t rounding;  // where moments are rounded: see bfloat16.h
};

// A chunk's own part of its row's state; moments are of type S in memory.
template <class Rule, class T, class S>
struct StateArrays {
    T *slow, *companion;
    S *cached, *moment[Rule::MOMENTS];
};

// The same of the scales, where moments lie in codes: of the chunk's blocks.
template <class Rule>
struct ScaleArrays {
    float *cached, *moment[Rule::MOMENTS];
};

// With an overflow among the gradients nothing at all changes, not even a counter.
LF_HD bool skips_step(const StepArguments& arguments) {
    return arguments.found_inf != nullptr && *arguments.found_inf != 0.0f;
}

LF_HD bool takes_part(const Row& row, Pass pass) { return pass == Pass::SYNC || row.column[GRAD] != nullptr; }

// The number in a slot of a group, from its tensor where it is one.
LF_HD double number_in(const Group& group, int slot) {
    for (const Live& live : group.live) {
        if (live.at != nullptr && live.slot == slot) {
            return live.is_double ? *static_cast<const double*>(live.at) : *static_cast<const float*>(live.at);
        }
    }
    return slot < MAX_RULE_HYPERS ? group.rule[slot] : group.policy[slot - MAX_RULE_HYPERS];
}

// A policy's hyperparameters, each looked up where it is asked for.
struct PolicyHypers {
    const Group& group;
    LF_HD double operator[](int i) const { return number_in(group, MAX_RULE_HYPERS + i); }
};

// What decides the coefficients of a row's next update, besides its group.
struct RowCounts {
    int64_t applied;  // updates so far
    int32_t moments_loaded;
    PolicyNumbers policy;

    LF_HD static RowCounts of(const Row& row) {
        const auto number = [&](int column) {
            const double* const at = static_cast<const double*>(row.column[column]);
            return at == nullptr ? 0.0 : *at;
        };
        return {static_cast<int64_t>(number(STEP)),
                row.moments_loaded,
                {number(AVERAGE_START), number(Y_INTERP), number(WEIGHT_SUM), number(LR_MAX)}};
    }
    LF_HD bool operator==(const RowCounts& other) const {
        return applied == other.applied && moments_loaded == other.moments_loaded && policy == other.policy;
    }
};

// What a step leaves of a row's numbers. It is the caller's to write, where a pass is a step.
LF_HD void advance(const Row& row, const PolicyNumbers& after) {
    *static_cast<double*>(row.column[STEP]) += 1.0;
    const auto write = [&](int column, double value) {
        double* const at = static_cast<double*>(row.column[column]);
        if (at != nullptr) *at = value;
    };
    write(Y_INTERP, after.y_interp);
    write(WEIGHT_SUM, after.weight_sum);
    write(LR_MAX, after.lr_max);
}

// The coefficients of a row's next update. keep(numbers) is told what it leaves of the policy's, which like the
// policy's coefficients are out of the way before the rule's are made: a GPU's registers do not hold both.
template <class Rule, class T, class Keep>
LF_HD void prepare(int32_t policy, const Group& group, const RowCounts& counts, const StepArguments& arguments,
                   RowStep<Rule, T>& to, Keep keep) {
    const double lr = number_in(group, 0);

    PolicyInputs slow;
    slow.step = counts.applied + 1;
    slow.lr = lr;
    // Where the inner step was done elsewhere, theta has moved already, and phi was taken before that.
    slow.captures = Rule::reads_gradient && counts.applied == 0;
    slow.event = arguments.pass == Pass::STEP ? (arguments.event_later != 0 ? Event::NEVER : Event::BY_COUNT)
                 : counts.applied > 0         ? Event::NOW
                                              : Event::NEVER;

    PolicyNumbers own = counts.policy;
    to.slow = prepare_slow<T>(Policies{}, policy, PolicyHypers{group}, slow, own);
    keep(own);

    StepInputs at;
    at.step = counts.applied + 1;
    at.lr = lr;
    at.weight_decay = 0;
    if constexpr (Rule::reads_gradient) at.weight_decay = number_in(group, static_cast<int>(Rule::WEIGHT_DECAY));
    at.grad_scale = arguments.grad_scale != nullptr ? *arguments.grad_scale : 1.0;
    at.clip = arguments.clip != nullptr ? *arguments.clip : 1.0;
    at.first = counts.applied == 0 && counts.moments_loaded == 0;
    to.rule = Rule::template prepare<T>(group.rule, at);
    // Last: held over the rest, it would take registers that a GPU does not have.
    const bool is_step = arguments.pass == Pass::STEP;
    to.rounding = rounding_key(is_step ? at.step : counts.applied, !is_step);
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
