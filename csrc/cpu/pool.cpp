#include "pool.h"

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

void Pool::grow(int workers) {
    while (static_cast<int>(workers_.size()) < workers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index] { serve(index); });
        workers_.back().detach();
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
