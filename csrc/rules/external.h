// The rule of an inner optimizer that is not ours: its step is done, and what is left is the policy's.
#pragma once

#include "rule.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct External {
    static constexpr const char* name = "external";
    static constexpr bool reads_gradient = false;

    // A policy may weigh by it.
    enum Hyper { LR, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"lr"};

    // Whatever the other optimizer calls its first moment, where a policy has something to do with it.
    enum Moment { FIRST_MOMENT, MOMENTS };
    static constexpr const char* moment_names[MOMENTS] = {"first_moment"};
    static constexpr bool squares[MOMENTS] = {false};

    template <class T>
    struct Coefficients {};

    template <class T>
    LF_HD static Coefficients<T> prepare(const double*, const StepInputs&) {
        return {};
    }

    template <class T, class V>
    LF_HD static void update(const Coefficients<T>&, V&, V, V (&)[MOMENTS]) {}
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
