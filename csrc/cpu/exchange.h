// Two tensors' elements trade places, in place.
#pragma once

#include <cstddef>
#include <vector>

namespace lookahead_fused {

struct Trade {
    std::byte* a;
    std::byte* b;
    size_t bytes;
};

// Needs no memory that grows with the tensors, and once begun it is carried through: no signal handler of Python's runs
// meanwhile, and nothing is thrown. Blocks of one trade must not overlap those of another.
void exchange(const std::vector<Trade>& trades, int threads, bool own_threads) noexcept;

}  // namespace lookahead_fused
