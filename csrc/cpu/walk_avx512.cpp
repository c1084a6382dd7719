#define LF_ISA avx512
#define LF_REGISTER_BYTES 64
#include "squares.h"
#include "walk.h"

namespace lookahead_fused {
const Kernel* find_avx512(const char* rule, Dtype param, Dtype grad, Dtype state) {
    return avx512::find(rule, param, grad, state);
}
SquaresOfBlock squares_avx512(Dtype grad) { return avx512::squares_of(grad); }
}  // namespace lookahead_fused
