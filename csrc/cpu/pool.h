// A set of threads that sleep until they are called. One that wakes late is not waited for.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

namespace lookahead_fused {

// One caller at a time. A pool is never destroyed: its threads sleep until the process ends, and at exit nothing may
// depend on them.
class Pool {
   public:
    // Calls `work` on the caller and on up to threads - 1 others, fewer where the system gives no more, and returns
    // when all that began it are done. It must be work that any number of threads may share, and may find done.
    void run(int threads, const std::function<void()>& work);

   private:
    void grow(int workers) noexcept;
    void serve(int index);

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    int workers_ = 0;
    const std::function<void()>* work_ = nullptr;
    bool open_ = false;
    int wanted_ = 0, running_ = 0;
    uint64_t region_ = 0;
};

}  // namespace lookahead_fused
