#include "pool.h"

#include <new>
#include <system_error>
#include <thread>

namespace lookahead_fused {

void Pool::run(int threads, const std::function<void()>& work) {
    grow(threads - 1);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        work_ = &work;
        wanted_ = threads - 1;
        open_ = true;
        ++region_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    // Only those that came are waited for. One that wakes late finds the region closed: while another's threads spin on
    // the other cores, that can be milliseconds later.
    open_ = false;
    done_.wait(lock, [this] { return running_ == 0; });
}

void Pool::grow(int workers) noexcept {
    try {
        for (; workers_ < workers; ++workers_) {
            std::thread([this, index = workers_] { serve(index); }).detach();
        }
    } catch (const std::system_error&) {
        // The process may have no more threads, now.
    } catch (const std::bad_alloc&) {
    }
}

void Pool::serve(int index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return region_ != seen; });
        seen = region_;
        if (!open_ || index >= wanted_) continue;
        ++running_;
        const auto* work = work_;
        lock.unlock();
        (*work)();
        lock.lock();
        if (--running_ == 0) done_.notify_one();
    }
}

}  // namespace lookahead_fused
