#define LF_ISA avx512
#define LF_REGISTER_BYTES 64
#include "walk.h"

namespace lookahead_fused {
const Kernel* find_avx512(const char* rule, Dtype param, Dtype grad) { return avx512::find(rule, param, grad); }
}  // namespace lookahead_fused
