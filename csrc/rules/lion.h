// Lion (Chen et al. 2023, algorithm 2), which has decoupled weight decay alone.
#pragma once

#include "numeric.h"
#include "rule.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct Lion {
    static constexpr const char* name = "lion";
    static constexpr bool reads_gradient = true;

    enum Hyper { LR, BETA1, BETA2, WEIGHT_DECAY, MAXIMIZE, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"lr", "beta1", "beta2", "weight_decay", "maximize"};

    enum Moment { EXP_AVG, MOMENTS };
    static constexpr const char* moment_names[MOMENTS] = {"exp_avg"};
    static constexpr bool squares[MOMENTS] = {false};

    template <class T>
    struct Coefficients {
        T gradient_factor, decay, lr;
        T beta1, one_minus_beta1, beta2, one_minus_beta2;
    };

    template <class T>
    LF_HD static Coefficients<T> prepare(const double* hyper, const StepInputs& at) {
        Coefficients<T> c;
        c.gradient_factor = static_cast<T>(gradient_factor(hyper[MAXIMIZE] != 0, at));
        c.decay = static_cast<T>(1.0 - at.lr * at.weight_decay);
        c.lr = static_cast<T>(at.lr);
        c.beta1 = static_cast<T>(hyper[BETA1]);
        c.one_minus_beta1 = static_cast<T>(1.0 - hyper[BETA1]);
        c.beta2 = static_cast<T>(hyper[BETA2]);
        c.one_minus_beta2 = static_cast<T>(1.0 - hyper[BETA2]);
        return c;
    }

    // No Lerp: its difference would round before the sign is taken, and the sign of a small sum is all that counts.
    template <class T, class V>
    LF_HD static void update(const Coefficients<T>& c, V& p, V g, V (&moment)[MOMENTS]) {
        g = c.gradient_factor * g;
        V& m = moment[EXP_AVG];
        p = p * c.decay - c.lr * sign(c.beta1 * m + c.one_minus_beta1 * g);
        m = c.beta2 * m + c.one_minus_beta2 * g;
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
