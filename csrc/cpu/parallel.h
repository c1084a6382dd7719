// One parallel region: a list of tasks, worked off by the caller and the threads that come to help.
//
// Those threads are torch's own, called by its stable C ABI. After a backward pass they spin on their cores for
// milliseconds, waiting for the next operator: other threads would wait as long for a core, longer than the step of a
// small model takes. Not by linking OpenMP: its runtime would be a second one beside torch's.
//
// A pool of our own (pool.h) serves where torch's threads cannot: where torch has no such function (before 2.10), and
// in a forked child, in which GNU's OpenMP waits for threads that its parent had.
#pragma once

#include <cstdint>
#include <functional>

namespace lookahead_fused {

// Whether the threads of a region in this process are torch's.
bool torch_threads_serve();

// Calls prepare() on the caller, then task(i) for every i in [0, count) on up to `threads` threads, the caller among
// them, and returns when all are done. Tasks are handed out in ascending order, and computed in the default
// floating-point environment. A region already running elsewhere in the process leaves this one to its caller alone.
// Where `own_threads` is true, torch's threads are not called.
//
// Neither function may throw. Where this throws itself, neither was called; where threads cannot be made, those that
// there are do all the tasks.
void parallel_for(int64_t count, int threads, bool own_threads, const std::function<void()>& prepare,
                  const std::function<void(int64_t)>& task);

}  // namespace lookahead_fused
