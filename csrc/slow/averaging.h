// Averaging at every step: theta is y, between a sequence z that the rule steps and an average x of it.
//
//   x = y + (y - z) (1 - mu) / mu     z <- inner(z)     x <- z + eval (x - z)     y <- z + train (x - z)
//
// with mu where y lay after the step before. Generalized Primal Averaging (arXiv 2512.17131) has both interpolations
// given. Schedule-Free (Defazio et al. 2024, arXiv 2405.15682, algorithm 1) has the weighted mean of z for x: step t
// weighs t^r times a power of the largest learning rate so far, and eval = 1 - weight / sum of weights.
//
// In the difference form x is y, to the bit, as long as z is: a step that changes nothing changes no bit.
#pragma once

#include "policy.h"

namespace lookahead_fused {
inline namespace LF_ISA {

template <class T>
LF_HD SlowStep<T> averaging(double train_interp, double eval_interp, const PolicyInputs& at, PolicyNumbers& own) {
    SlowStep<T> c{};
    c.due = at.event == Event::BY_COUNT;
    c.capture = at.captures;
    c.restarts = 1;
    c.kind = AVERAGING;
    // In the first step x, y and z are one.
    c.recovery = static_cast<T>(own.y_interp > 0 ? (1.0 - own.y_interp) / own.y_interp : 0.0);
    c.eval_interp = static_cast<T>(eval_interp);
    c.train_interp = static_cast<T>(train_interp);
    own.y_interp = train_interp;
    return c;
}

struct Gpa {
    static constexpr const char* name = "gpa";
    static constexpr bool averages = true;

    enum Hyper { TRAIN_INTERP, EVAL_INTERP, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"train_interp", "eval_interp"};

    template <class T, class Hypers>
    LF_HD static SlowStep<T> prepare(const Hypers& hyper, const PolicyInputs& at, PolicyNumbers& own) {
        return averaging<T>(hyper[TRAIN_INTERP], hyper[EVAL_INTERP], at, own);
    }
};

struct ScheduleFree {
    static constexpr const char* name = "schedule_free";
    static constexpr bool averages = true;

    enum Hyper { INTERP, R, WEIGHT_LR_POWER, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"interp", "r", "weight_lr_power"};

    template <class T, class Hypers>
    LF_HD static SlowStep<T> prepare(const Hypers& hyper, const PolicyInputs& at, PolicyNumbers& own) {
        own.lr_max = own.lr_max < at.lr ? at.lr : own.lr_max;
        const double weight = power(static_cast<double>(at.step), static_cast<int64_t>(hyper[R])) *
                              power(own.lr_max, static_cast<int64_t>(hyper[WEIGHT_LR_POWER]));
        own.weight_sum = own.weight_sum + weight;
        // As long as no sample weighs anything, x stays.
        const double share = own.weight_sum > 0 ? weight / own.weight_sum : 0.0;
        return averaging<T>(hyper[INTERP], 1.0 - share, at, own);
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
