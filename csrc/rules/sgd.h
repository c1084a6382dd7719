// Stochastic gradient descent with momentum, dampening and Nesterov's form, as torch.optim.SGD defines them
// (Sutskever et al. 2013, with the learning rate outside the velocity).
#pragma once

#include "numeric.h"
#include "rule.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct Sgd {
    static constexpr const char* name = "sgd";
    static constexpr bool reads_gradient = true;

    enum Hyper { LR, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV, MAXIMIZE, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"lr",           "momentum", "dampening",
                                                        "weight_decay", "nesterov", "maximize"};

    enum Moment { MOMENTUM_BUFFER, MOMENTS };
    static constexpr const char* moment_names[MOMENTS] = {"momentum_buffer"};
    static constexpr bool squares[MOMENTS] = {false};

    template <class T>
    struct Coefficients {
        T gradient_factor, weight_decay, momentum, one_minus_dampening, lr;
        int32_t decays, accelerated, nesterov, first;
    };

    template <class T>
    LF_HD static Coefficients<T> prepare(const double* hyper, const StepInputs& at) {
        Coefficients<T> c;
        c.gradient_factor = static_cast<T>(gradient_factor(hyper[MAXIMIZE] != 0, at));
        c.weight_decay = static_cast<T>(at.weight_decay);
        c.momentum = static_cast<T>(hyper[MOMENTUM]);
        c.one_minus_dampening = static_cast<T>(1.0 - hyper[DAMPENING]);
        c.lr = static_cast<T>(at.lr);
        c.decays = at.weight_decay != 0;
        c.accelerated = hyper[MOMENTUM] != 0;
        c.nesterov = hyper[NESTEROV] != 0;
        c.first = at.first;
        return c;
    }

    template <class T, class V>
    LF_HD static void update(const Coefficients<T>& c, V& p, V g, V (&moment)[MOMENTS]) {
        g = c.gradient_factor * g;
        if (c.decays) g = g + c.weight_decay * p;
        if (c.accelerated) {
            V& buffer = moment[MOMENTUM_BUFFER];
            // torch starts the buffer at the first gradient, undampened.
            buffer = c.first ? g : c.momentum * buffer + c.one_minus_dampening * g;
            g = c.nesterov ? g + c.momentum * buffer : buffer;
        }
        p = p - c.lr * g;
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
