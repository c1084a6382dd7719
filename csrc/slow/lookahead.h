// Lookahead's slow weights (Zhang, Lucas, Hinton, Ba 2019, algorithm 1): phi <- phi + alpha (theta - phi), theta <-
// phi, and what becomes of the inner optimizer's first moment there. With outer momentum mu, phi takes a step of SGD
// with momentum along s = phi - theta (SNOO: Kallusky, Rao, Nandavanam, Shi 2025; DiLoCo's outer step: Douillard et al.
// 2023): b <- mu b + s, phi <- phi - alpha (s + mu b), or where it is not Nesterov's form phi <- phi - alpha b.
#pragma once

#include "policy.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct Lookahead {
    static constexpr const char* name = "lookahead";
    static constexpr bool averages = false;

    enum Hyper { K, ALPHA, PULLBACK_MOMENTUM, OUTER_MOMENTUM, OUTER_NESTEROV, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"k", "alpha", "pullback_momentum", "outer_momentum",
                                                        "outer_nesterov"};

    template <class T, class Hypers>
    LF_HD static SlowStep<T> prepare(const Hypers& hyper, const PolicyInputs& at, PolicyNumbers&) {
        SlowStep<T> c{};
        // No count of updates reaches 2^53, which stands for every longer period.
        const bool by_count = at.event == Event::BY_COUNT && at.step % static_cast<int64_t>(hyper[K]) == 0;
        c.due = by_count || at.event == Event::NOW;
        c.capture = at.captures;
        c.restarts = 1;
        // Only outer momentum takes phi further than theta; a moment is not taken further than it is.
        c.weight = Lerp<T>::with(hyper[ALPHA] < 1.0 ? hyper[ALPHA] : 1.0);
        c.pullback = static_cast<int32_t>(hyper[PULLBACK_MOMENTUM]);
        c.acts_on_moment = c.pullback != KEEP;
        if (hyper[OUTER_MOMENTUM] != 0) c.kind = hyper[OUTER_NESTEROV] != 0 ? NESTEROV : CLASSICAL;
        c.outer_alpha = static_cast<T>(hyper[ALPHA]);
        c.outer_momentum = static_cast<T>(hyper[OUTER_MOMENTUM]);
        return c;
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
