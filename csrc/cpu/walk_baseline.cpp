#define LF_ISA baseline
#define LF_REGISTER_BYTES 16
#include "squares.h"
#include "walk.h"

namespace lookahead_fused {
const Kernel* find_baseline(const char* rule, Dtype param, Dtype grad, Dtype state) {
    return baseline::find(rule, param, grad, state);
}
SquaresOfBlock squares_baseline(Dtype grad) { return baseline::squares_of(grad); }
}  // namespace lookahead_fused
