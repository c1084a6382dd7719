#include "huge_pages.h"

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lookahead_fused {

void prefer_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
    // x86-64's, and arm64's with pages of 4 KiB; where they are larger the kernel rounds for itself.
    constexpr uintptr_t HUGE_PAGE = uintptr_t{1} << 21;
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const uintptr_t last = (begin + bytes) / HUGE_PAGE * HUGE_PAGE;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace lookahead_fused
