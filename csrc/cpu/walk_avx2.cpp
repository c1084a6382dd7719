#define LF_ISA avx2
#define LF_REGISTER_BYTES 32
#include "squares.h"
#include "walk.h"

namespace lookahead_fused {
const Kernel* find_avx2(const char* rule, Dtype param, Dtype grad, Dtype state) {
    return avx2::find(rule, param, grad, state);
}
SquaresOfBlock squares_avx2(Dtype grad) { return avx2::squares_of(grad); }
}  // namespace lookahead_fused
