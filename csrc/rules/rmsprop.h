// RMSprop (Tieleman and Hinton 2012, lecture 6.5), centered (Graves 2013, equations 38 to 45) and with momentum, as
// torch.optim.RMSprop defines them: eps stands outside of the root.
#pragma once

#include "numeric.h"
#include "rule.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct RMSprop {
    static constexpr const char* name = "rmsprop";
    static constexpr bool reads_gradient = true;

    enum Hyper { LR, ALPHA, EPS, WEIGHT_DECAY, MOMENTUM, CENTERED, MAXIMIZE, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"lr",       "alpha",    "eps",     "weight_decay",
                                                        "momentum", "centered", "maximize"};

    enum Moment { MOMENTUM_BUFFER, SQUARE_AVG, GRAD_AVG, MOMENTS };
    static constexpr const char* moment_names[MOMENTS] = {"momentum_buffer", "square_avg", "grad_avg"};
    static constexpr bool squares[MOMENTS] = {false, true, false};

    template <class T>
    struct Coefficients {
        T gradient_factor, weight_decay, alpha, one_minus_alpha;
        Lerp<T> grad_avg;
        T eps, momentum, lr;
        int32_t decays, centered, accelerated;
    };

    template <class T>
    LF_HD static Coefficients<T> prepare(const double* hyper, const StepInputs& at) {
        Coefficients<T> c;
        c.gradient_factor = static_cast<T>(gradient_factor(hyper[MAXIMIZE] != 0, at));
        c.weight_decay = static_cast<T>(at.weight_decay);
        c.alpha = static_cast<T>(hyper[ALPHA]);
        c.one_minus_alpha = static_cast<T>(1.0 - hyper[ALPHA]);
        c.grad_avg = Lerp<T>::with(1.0 - hyper[ALPHA]);
        c.eps = static_cast<T>(hyper[EPS]);
        c.momentum = static_cast<T>(hyper[MOMENTUM]);
        c.lr = static_cast<T>(at.lr);
        c.decays = at.weight_decay != 0;
        c.centered = hyper[CENTERED] != 0;
        c.accelerated = hyper[MOMENTUM] > 0;
        return c;
    }

    template <class T, class V>
    LF_HD static void update(const Coefficients<T>& c, V& p, V g, V (&moment)[MOMENTS]) {
        g = c.gradient_factor * g;
        if (c.decays) g = g + c.weight_decay * p;
        V second = moment[SQUARE_AVG] = c.alpha * moment[SQUARE_AVG] + c.one_minus_alpha * (g * g);
        if (c.centered) {
            const V mean = moment[GRAD_AVG] = c.grad_avg(moment[GRAD_AVG], g);
            second = second - mean * mean;
        }
        // One division for both: with two, fp64's registers spill on sm_120.
        if (!c.accelerated) g = c.lr * g;
        V step = g / (square_root(second) + c.eps);
        if (c.accelerated) {
            V& buffer = moment[MOMENTUM_BUFFER];
            buffer = c.momentum * buffer + step;
            step = c.lr * buffer;
        }
        p = p - step;
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
