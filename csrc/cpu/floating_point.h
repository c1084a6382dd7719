// Subnormal numbers and rounding are the same in every step and on every thread, whatever the caller set for its own
// arithmetic (torch.set_flush_denormal sets it for one thread): else the bits of an element would depend on the thread
// it fell to.
#pragma once

#include <cfenv>

namespace lookahead_fused {

class DefaultFloatingPoint {
   public:
    DefaultFloatingPoint() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
    DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
    DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

   private:
    std::fenv_t saved_;
};

}  // namespace lookahead_fused
