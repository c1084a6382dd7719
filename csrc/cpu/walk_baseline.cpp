#define LF_ISA baseline
#define LF_REGISTER_BYTES 16
#include "walk.h"

namespace lookahead_fused {
const Kernel* find_baseline(const char* rule, Dtype param, Dtype grad) { return baseline::find(rule, param, grad); }
}  // namespace lookahead_fused
