// Addresses as Python's integers have them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../table/norm.h"

namespace lookahead_fused {

template <class T = std::byte>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline ClipArguments clip_arguments(uintptr_t sums, int64_t count, uintptr_t grad_scale, uintptr_t found_inf,
                                    uintptr_t clip, uintptr_t skip, uintptr_t skipped) {
    return {pointer<double>(sums),      count,
            pointer<float>(grad_scale), pointer<float>(found_inf),
            pointer<double>(clip),      pointer<float>(skip),
            pointer<int64_t>(skipped)};
}

}  // namespace lookahead_fused
