// The walks of a rule: which there are, found by a pattern of dtypes.
#pragma once

#include "dtypes.h"

namespace lookahead_fused {

// Calls visit(a value of the pattern's type); false where the rule has no such walk.
template <class Rule, class Visit>
bool with_walk(Dtype param, Dtype grad, Dtype state, Visit visit) {
    return Patterns::any([&](auto pattern) {
        // Where no gradient is read, one pattern stands for all that differ in it.
        if constexpr (Rule::reads_gradient || pattern.param == pattern.grad) {
            if (param != pattern.param || state != pattern.state) return false;
            if (Rule::reads_gradient && grad != pattern.grad) return false;
            visit(pattern);
            return true;
        }
        return false;
    });
}

}  // namespace lookahead_fused
