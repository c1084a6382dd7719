#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "floating_point.h"

namespace lookahead_fused {
namespace {

class Pool {
   public:
    void run(int64_t count, int threads, const std::function<void(int64_t)>& task) {
        grow(threads - 1);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = &task;
            count_ = count;
            next_.store(0, std::memory_order_relaxed);
            wanted_ = threads - 1;
            open_ = true;
            ++region_;
        }
        wake_.notify_all();
        work(task, count);
        std::unique_lock<std::mutex> lock(mutex_);
        // Only those that came are waited for. One that wakes late finds the region closed: after a backward pass
        // torch's own threads spin on the other cores for milliseconds, longer than a small model's step takes.
        open_ = false;
        done_.wait(lock, [this] { return running_ == 0; });
    }

   private:
    void grow(int workers) {
        while (static_cast<int>(workers_.size()) < workers) {
            const int index = static_cast<int>(workers_.size());
            // A worker sleeps until the process ends, and is not waited for: at exit nothing may depend on it.
            workers_.emplace_back([this, index] { serve(index); });
            workers_.back().detach();
        }
    }

    void serve(int index) {
        const DefaultFloatingPoint defaults;
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return region_ != seen; });
            seen = region_;
            if (!open_ || index >= wanted_) continue;
            ++running_;
            const auto* task = task_;
            const int64_t count = count_;
            lock.unlock();
            work(*task, count);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }

    void work(const std::function<void(int64_t)>& task, int64_t count) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> workers_;
    const std::function<void(int64_t)>* task_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0};
    bool open_ = false;
    int wanted_ = 0, running_ = 0;
    uint64_t region_ = 0;
};

// A forked child has none of its parent's threads: it leaves the parent's pool behind, and takes a new one.
struct Current {
    Current() {
        pthread_atfork(nullptr, nullptr, [] {
            current().pool = new Pool;
            current().busy.clear();
        });
    }
    static Current& current() {
        static Current* const instance = new Current;
        return *instance;
    }
    Pool* pool = new Pool;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
    Current& current = Current::current();
    const int useful = static_cast<int>(threads < count ? threads : count);
    if (useful <= 1 || current.busy.test_and_set(std::memory_order_acquire)) {
        for (int64_t i = 0; i < count; ++i) task(i);
        return;
    }
    current.pool->run(count, useful, task);
    current.busy.clear(std::memory_order_release);
}

}  // namespace lookahead_fused
