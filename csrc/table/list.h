// A list of types, and a loop over it.
#pragma once

namespace lookahead_fused {

template <class... Members>
struct List {
    // Calls visit(a value of each member's type) in order, until one call returns true; whether one did.
    template <class Visit>
    static constexpr bool any(Visit visit) {
        return (visit(Members{}) || ...);
    }
};

}  // namespace lookahead_fused
