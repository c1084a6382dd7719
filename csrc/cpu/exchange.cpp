#include "exchange.h"

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace lookahead_fused {
namespace {

// What a thread takes at a time, and what it holds of that in the first cache.
constexpr size_t SPAN = 1 << 20, BLOCK = 1 << 12;

void trade(std::byte* a, std::byte* b, size_t bytes) {
    std::byte held[BLOCK];
    for (size_t done = 0; done < bytes; done += BLOCK) {
        const size_t count = bytes - done < BLOCK ? bytes - done : BLOCK;
        std::memcpy(held, a + done, count);
        std::memcpy(a + done, b + done, count);
        std::memcpy(b + done, held, count);
    }
}

}  // namespace

void exchange(const std::vector<Trade>& trades, int threads, bool own_threads) noexcept {
    for (const Trade& whole : trades) {
        const auto spans = static_cast<int64_t>((whole.bytes + SPAN - 1) / SPAN);
        parallel_for(
            spans, threads, own_threads, [] {},
            [&](int64_t i) {
                const size_t begin = static_cast<size_t>(i) * SPAN;
                trade(whole.a + begin, whole.b + begin, whole.bytes - begin < SPAN ? whole.bytes - begin : SPAN);
            });
    }
}

}  // namespace lookahead_fused
