// Runs a kernel's blocks one after the other, every thread of a block as a fiber that a barrier suspends.
#pragma once

#include <functional>

// `order` 0: blocks and threads in their order; else a seed to shuffle them by. `after_block` may end the launch by
// false. False where threads wait for others that will not come.
bool run_blocks(unsigned blocks, unsigned threads, const std::function<void()>& thread, unsigned order,
                const std::function<bool()>& after_block);
