// One parallel region: a task list worked off by the caller and a set of sleeping threads.
//
// Not OpenMP: its runtime would be a second one beside torch's, each spinning for the cores the other needs, and
// neither survives a fork. Threads here sleep between regions, and a forked child starts its own.
#pragma once

#include <cstdint>
#include <functional>

namespace lookahead_fused {

// Calls task(i) for every i in [0, count) on up to `threads` threads, the caller among them, and returns when all are
// done. Tasks are handed out in ascending order. A region already running elsewhere in the process leaves this one to
// its caller alone.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace lookahead_fused
