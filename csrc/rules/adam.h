// Adam (Kingma and Ba 2015, algorithm 1) with L2 regularisation or decoupled weight decay (AdamW: Loshchilov and
// Hutter 2019, algorithm 2), and AMSGrad (Reddi et al. 2018, algorithm 2), as torch.optim.Adam and AdamW define them.
#pragma once

#include "numeric.h"
#include "rule.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct Adam {
    static constexpr const char* name = "adam";
    static constexpr bool reads_gradient = true;

    enum Hyper { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, DECOUPLED, AMSGRAD, MAXIMIZE, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {
        "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize"};

    enum Moment { EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, MOMENTS };
    static constexpr const char* moment_names[MOMENTS] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};
    static constexpr bool squares[MOMENTS] = {false, true, true};

    template <class T>
    struct Coefficients {
        T gradient_factor, decay, weight_decay;
        Lerp<T> exp_avg;
        T beta2, one_minus_beta2;
        T step_size, inverse_sqrt_correction2, eps;
        int32_t l2, decoupled, amsgrad;
    };

    template <class T>
    LF_HD static Coefficients<T> prepare(const double* hyper, const StepInputs& at) {
        const double correction1 = 1.0 - power(hyper[BETA1], at.step);
        const double correction2 = 1.0 - power(hyper[BETA2], at.step);
        const bool decays = at.weight_decay != 0;
        Coefficients<T> c;
        c.gradient_factor = static_cast<T>(gradient_factor(hyper[MAXIMIZE] != 0, at));
        c.decay = static_cast<T>(1.0 - at.lr * at.weight_decay);
        c.weight_decay = static_cast<T>(at.weight_decay);
        c.exp_avg = Lerp<T>::with(1.0 - hyper[BETA1]);
        c.beta2 = static_cast<T>(hyper[BETA2]);
        c.one_minus_beta2 = static_cast<T>(1.0 - hyper[BETA2]);
        c.step_size = static_cast<T>(at.lr / correction1);
        c.inverse_sqrt_correction2 = static_cast<T>(1.0 / square_root(correction2));
        c.eps = static_cast<T>(hyper[EPS]);
        c.l2 = decays && hyper[DECOUPLED] == 0;
        c.decoupled = decays && hyper[DECOUPLED] != 0;
        c.amsgrad = hyper[AMSGRAD] != 0;
        return c;
    }

    template <class T, class V>
    LF_HD static void update(const Coefficients<T>& c, V& p, V g, V (&moment)[MOMENTS]) {
        g = c.gradient_factor * g;
        if (c.decoupled) p = p * c.decay;
        if (c.l2) g = g + c.weight_decay * p;
        const V m = c.exp_avg(moment[EXP_AVG], g);
        const V v = c.beta2 * moment[EXP_AVG_SQ] + c.one_minus_beta2 * (g * g);
        moment[EXP_AVG] = m;
        moment[EXP_AVG_SQ] = v;
        V second = v;
        if (c.amsgrad) second = moment[MAX_EXP_AVG_SQ] = maximum(v, moment[MAX_EXP_AVG_SQ]);
        p = p - (c.step_size * m) / (square_root(second) * c.inverse_sqrt_correction2 + c.eps);
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
