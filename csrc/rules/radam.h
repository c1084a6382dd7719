// RAdam (Liu et al. 2020, algorithm 2) with L2 regularisation or decoupled weight decay, as torch.optim.RAdam defines
// it: without the second moment until rho > 5.
#pragma once

#include "numeric.h"
#include "rule.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct RAdam {
    static constexpr const char* name = "radam";
    static constexpr bool reads_gradient = true;

    enum Hyper { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, DECOUPLED, MAXIMIZE, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {
        "lr", "beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay", "maximize"};

    enum Moment { EXP_AVG, EXP_AVG_SQ, MOMENTS };
    static constexpr const char* moment_names[MOMENTS] = {"exp_avg", "exp_avg_sq"};
    static constexpr bool squares[MOMENTS] = {false, true};

    template <class T>
    struct Coefficients {
        T gradient_factor, decay, weight_decay;
        Lerp<T> exp_avg;
        T beta2, one_minus_beta2, step_size, eps;
        int32_t l2, decoupled, rectified;
    };

    template <class T>
    LF_HD static Coefficients<T> prepare(const double* hyper, const StepInputs& at) {
        const double power2 = power(hyper[BETA2], at.step), correction2 = 1.0 - power2;
        // How many gradients the second moment stands for, at most and by now.
        const double rho_inf = 2.0 / (1.0 - hyper[BETA2]) - 1.0;
        const double rho = rho_inf - 2.0 * static_cast<double>(at.step) * power2 / correction2;
        double factor = 1.0;
        if (rho > 5.0) {
            const double rectification =
                (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho);
            factor = square_root(rectification * correction2);
        }
        const double step_size = at.lr / (1.0 - power(hyper[BETA1], at.step)) * factor;
        const bool decays = at.weight_decay != 0;
        Coefficients<T> c;
        c.gradient_factor = static_cast<T>(gradient_factor(hyper[MAXIMIZE] != 0, at));
        c.decay = static_cast<T>(1.0 - at.lr * at.weight_decay);
        c.weight_decay = static_cast<T>(at.weight_decay);
        c.exp_avg = Lerp<T>::with(1.0 - hyper[BETA1]);
        c.beta2 = static_cast<T>(hyper[BETA2]);
        c.one_minus_beta2 = static_cast<T>(1.0 - hyper[BETA2]);
        c.step_size = static_cast<T>(step_size);
        c.eps = static_cast<T>(hyper[EPS]);
        c.l2 = decays && hyper[DECOUPLED] == 0;
        c.decoupled = decays && hyper[DECOUPLED] != 0;
        c.rectified = rho > 5.0;
        return c;
    }

    template <class T, class V>
    LF_HD static void update(const Coefficients<T>& c, V& p, V g, V (&moment)[MOMENTS]) {
        g = c.gradient_factor * g;
        if (c.decoupled) p = p * c.decay;
        if (c.l2) g = g + c.weight_decay * p;
        const V m = moment[EXP_AVG] = c.exp_avg(moment[EXP_AVG], g);
        const V v = moment[EXP_AVG_SQ] = c.beta2 * moment[EXP_AVG_SQ] + c.one_minus_beta2 * (g * g);
        V step = c.step_size * m;
        if (c.rectified) step = step / (square_root(v) + c.eps);
        p = p - step;
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
