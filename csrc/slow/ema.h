// The exponential moving average of the weights (Polyak and Juditsky 1992 average uniformly; with decay: Ruppert 1988,
// Tarvainen and Valpola 2017): a <- a + (1 - d) (theta - a). Theta does not follow it.
//
// The average begins as theta after `start` updates, or where that is earlier, as theta was when the average was made.
// From there on every `every`-th update is an event; the n-th has d = min(decay, (1 + n) / (10 + n)) with warm-up, and
// 1 - d = 1 / (n + 1) where the mean is uniform (SWA: Izmailov et al. 2018).
#pragma once

#include "policy.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct Ema {
    static constexpr const char* name = "ema";
    static constexpr bool averages = false;

    enum Hyper { DECAY, EVERY, START, WARMUP, HYPERS };
    static constexpr const char* hyper_names[HYPERS] = {"decay", "every", "start", "warmup"};

    // A decay that stands for the uniform mean.
    static constexpr double UNIFORM = -1.0;

    template <class T, class Hypers>
    LF_HD static SlowStep<T> prepare(const Hypers& hyper, const PolicyInputs& at, PolicyNumbers& own) {
        SlowStep<T> c{};
        const int64_t start = static_cast<int64_t>(hyper[START]), every = static_cast<int64_t>(hyper[EVERY]);
        const int64_t made_after = static_cast<int64_t>(own.average_start);
        const int64_t begin = made_after > start ? made_after : start;
        const int64_t since = at.step - begin, n = since > 0 ? since / every : 0;
        c.due = at.event == Event::BY_COUNT && since >= 0 && since == n * every;
        c.capture = at.captures;
        double weight = 1.0 - hyper[DECAY];
        if (hyper[DECAY] == UNIFORM) weight = 1.0 / static_cast<double>(n + 1);
        if (hyper[WARMUP] != 0) {
            const double warm = static_cast<double>(1 + n) / static_cast<double>(10 + n);
            if (warm < hyper[DECAY]) weight = 1.0 - warm;
        }
        // The first sample is the average.
        c.weight = Lerp<T>::with(n == 0 ? 1.0 : weight);
        return c;
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
