// The slow weights' half of a step: what a policy is told, what it decides for a parameter, and the one form of an
// event of an element, which all policies share.
//
// A policy is a struct of static members:
//   name
//   averages                whether it does at every step what `SlowStep::averaged` does, and nothing else
//   Hyper, hyper_names      its hyperparameters, in the order in which Python writes them into a Group
//   prepare<T>(hyper, at, own)  decides a parameter's SlowStep, in fp64, and the numbers that it keeps for the
//                           parameter: `own` is what they were, and becomes what they are after this step
//
// Policies differ in what they decide and not in the walk, so that a walk is compiled once for a rule and a pattern of
// dtypes, whatever the policy: crossed with it as rules are with dtypes, the kernels would take twice as long to build
// for each policy more. Which one it is, is asked once for a row.
#pragma once

#include "../rules/numeric.h"

namespace lookahead_fused {
inline namespace LF_ISA {

enum class Event : int32_t {
    BY_COUNT,  // when the policy's rhythm says so
    NOW,       // it was asked for
    NEVER      // it was asked for, of slow weights that have not begun
};

struct PolicyInputs {
    int64_t step;      // applied updates of this parameter, this one counted
    int32_t captures;  // this is the parameter's first update, and theta is still what it was before
    Event event;
    double lr;  // the group's learning rate, 1 where the other optimizer has none
};

// The numbers that policies keep for a parameter beside its count of updates; 0 where it keeps none.
struct PolicyNumbers {
    double average_start;  // how many updates there were when the slow weights were made; not changed by a step
    double y_interp;       // theta's place between z and x, as the last step left it
    double weight_sum;     // of the samples in a weighted mean
    double lr_max;         // the largest learning rate so far

    LF_HD bool operator==(const PolicyNumbers& other) const {
        return average_start == other.average_start && y_interp == other.y_interp && weight_sum == other.weight_sum &&
               lr_max == other.lr_max;
    }
};

// What becomes of the rule's first moment at an event: it is kept, interpolated like the weights, or reset.
enum Pullback : int32_t { KEEP, INTERPOLATE, RESET };

// Slow weights without a momentum of their own, with the classical one, or with Nesterov's; or theta lies between a
// sequence z, which the rule steps, and an average x of it, at every step.
enum Kind : int32_t { NO_MOMENTUM, CLASSICAL, NESTEROV, AVERAGING };

// Plain data of one form for all policies. What one kind of policy has shares its place with what another has: a field
// more, and kernels for GPUs no longer fit their registers.
template <class T>
struct SlowStep {
    int32_t due;             // there is an event: the slow columns are read and written
    int32_t capture;         // the slow weights start in this step, at theta as the step found it
    int32_t acts_on_moment;  // an event changes the rule's first moment
    int32_t restarts;        // after an event theta goes on from the slow weights
    union {
        Lerp<T> weight;  // of theta in the slow weights, and of the first moment in its cached copy
        T train_interp;  // of x in theta
    };
    int32_t pullback;
    int32_t kind;
    union {
        T outer_alpha;
        T recovery;  // x = y + recovery (y - z), as the last step left y
    };
    union {
        T outer_momentum;
        T eval_interp;  // of x in the next x
    };

    // Where x is from where theta is.
    template <class V>
    LF_HD V average(V y, V z) const {
        return y + recovery * (y - z);
    }

    // z is theta as the rule left it.
    template <class V>
    LF_HD void averaged(V& p, V z, V& x) const {
        x = z + eval_interp * (x - z);
        p = z + train_interp * (x - z);
    }

    // buffer is the momentum of the slow weights.
    template <class V>
    LF_HD void weights(V& p, V& slow, V& buffer) const {
        if (kind != NO_MOMENTUM) {
            const V difference = slow - p;
            buffer = outer_momentum * buffer + difference;
            slow = slow - outer_alpha * (kind == NESTEROV ? difference + outer_momentum * buffer : buffer);
            // It goes with a restart: to ask would keep theta in registers that a GPU does not have.
            p = slow;
        } else {
            slow = weight(slow, p);
            if (restarts) p = slow;
        }
    }

    // cached is the moment as the last event left it.
    template <class V>
    LF_HD void moment(V& m, V& cached) const {
        if (pullback == INTERPOLATE) cached = m = weight(cached, m);
        if (pullback == RESET) m = V{};
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
