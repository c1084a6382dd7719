// No slow weights: the rule alone. Its rows have nothing in the policies' columns.
#pragma once

#include "policy.h"

namespace lookahead_fused {
inline namespace LF_ISA {

struct Alone {
    static constexpr const char* name = "alone";
    static constexpr bool averages = false;

    enum Hyper { HYPERS };
    static constexpr const char* const* hyper_names = nullptr;

    template <class T, class Hypers>
    LF_HD static SlowStep<T> prepare(const Hypers&, const PolicyInputs&, PolicyNumbers&) {
        return {};
    }
};

}  // namespace LF_ISA
}  // namespace lookahead_fused
