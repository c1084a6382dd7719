// The one list of rules. Every walk, every binding and the build itself go by it: CMakeLists.txt reads the names in the
// angle brackets, to compile one CUDA file for each.
#pragma once

#include "../table/list.h"
#include "adam.h"
#include "external.h"
#include "lion.h"
#include "radam.h"
#include "rmsprop.h"
#include "sgd.h"

namespace lookahead_fused {
inline namespace LF_ISA {

using Rules = List<Adam, Sgd, RMSprop, RAdam, Lion, External>;

}  // namespace LF_ISA
}  // namespace lookahead_fused
