// The one list of policies. A table's policy is known by its place in it.
#pragma once

#include "../table/list.h"
#include "alone.h"
#include "averaging.h"
#include "ema.h"
#include "lookahead.h"

namespace lookahead_fused {
inline namespace LF_ISA {

using Policies = List<Lookahead, Ema, Gpa, ScheduleFree, Alone>;

template <class T, class Hypers, class First, class... Others>
LF_HD SlowStep<T> prepare_slow(List<First, Others...>, int32_t policy, const Hypers& hyper, const PolicyInputs& at,
                               PolicyNumbers& own) {
    if constexpr (sizeof...(Others) > 0) {
        if (policy > 0) return prepare_slow<T>(List<Others...>{}, policy - 1, hyper, at, own);
    }
    return First::template prepare<T>(hyper, at, own);
}

// Whether a policy's rows are walked by the averaging walk.
template <class... Members>
bool averages(List<Members...>, int32_t policy) {
    constexpr bool each[] = {Members::averages...};
    return each[policy];
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
