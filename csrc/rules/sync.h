// Lookahead's slow weights (Zhang, Lucas, Hinton, Ba 2019, algorithm 1): phi <- phi + alpha (theta - phi), theta <-
// phi, and what becomes of the inner optimizer's first moment there; and the rule of an inner optimizer that is not
// ours.
#pragma once

#include "numeric.h"
#include "rule.h"

namespace lookahead_fused {
inline namespace LF_ISA {

enum Pullback : int32_t { PULLBACK_NONE, PULLBACK_INTERPOLATE, PULLBACK_RESET };

template <class T>
struct Sync {
    Lerp<T> alpha;
    int32_t due;       // this step ends with an interpolation
    int32_t capture;   // phi starts here: it is theta as this step found it
    int32_t pullback;  // a Pullback

    template <class V>
    LF_HD void weights(V& p, V& slow) const {
        slow = alpha(slow, p);
        p = slow;
    }

    // The paper's three treatments of the inner optimizer's state: kept, interpolated, reset. slow_moment is the
    // moment as the last sync left it.
    template <class V>
    LF_HD void moment(V& m, V& slow_moment) const {
        if (pullback == PULLBACK_INTERPOLATE) slow_moment = m = alpha(slow_moment, m);
        if (pullback == PULLBACK_RESET) m = V{};
    }
};

// The inner step was done elsewhere, by any optimizer; a walk has only the interpolation left to do.
struct SyncOnly {
    static constexpr const char* name = "sync";
    static constexpr bool reads_gradient = false;

    enum Hyper { TRACKS_MOMENT, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"tracks_moment"};

    enum Moment { FIRST_MOMENT, MOMENTS };
    static constexpr const char* moment_names[MOMENTS] = {"first_moment"};

    template <class T>
    struct Coefficients {};

    LF_HD static uint32_t moments(const double* hyper) { return hyper[TRACKS_MOMENT] != 0 ? 0b1u : 0b0u; }

    template <class T>
    LF_HD static Coefficients<T> prepare(const double*, const StepInputs&) {
        return {};
    }

    template <class T, class V>
    LF_HD static void update(const Coefficients<T>&, V&, V, V (&)[MOMENTS]) {}
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
