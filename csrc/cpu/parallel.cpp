#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstring>

#include "../torch/symbol.h"
#include "floating_point.h"
#include "pool.h"

namespace lookahead_fused {
namespace {

// torch/csrc/stable/c/shim.h: body(begin, end, context) for parts of [begin, end), none smaller than the grain but the
// last, on at most as many of torch's threads as torch.get_num_threads() says; 0 unless a body threw.
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain_size,
                                     void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Whether this process is a fork of one that may have run a region of torch's before this module was loaded here.
bool is_forked() {
    constexpr unsigned PF_FORKNOEXEC = 0x40;  // linux/sched.h: forked, and no program executed since
    char text[512] = "";
    if (std::FILE* const file = std::fopen("/proc/self/stat", "r")) {
        text[std::fread(text, 1, sizeof(text) - 1, file)] = '\0';
        std::fclose(file);
    }
    // proc(5): pid (name) state ppid pgrp session tty_nr tpgid flags; the name may hold anything.
    const char* const after_name = std::strrchr(text, ')');
    unsigned flags = 0;
    return after_name != nullptr && std::sscanf(after_name, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 &&
           (flags & PF_FORKNOEXEC) != 0;
}

// A forked child has none of its parent's threads: it leaves the parent's pool behind, and takes a new one.
struct Process {
    Process() {
        find_in_torch(torch_parallel_for, "torch_parallel_for");
        if (is_forked()) torch_parallel_for = nullptr;
        pthread_atfork(nullptr, nullptr, [] {
            current().torch_parallel_for = nullptr;
            current().pool = new Pool;
            current().busy.clear();
        });
    }
    static Process& current() {
        static Process* const instance = new Process;
        return *instance;
    }
    TorchParallelFor torch_parallel_for = nullptr;
    Pool* pool = new Pool;
    std::atomic_flag busy = ATOMIC_FLAG_INIT;
};

// The process's one region with helpers; the next comes when this is gone, however its scope was left.
class Claim {
   public:
    Claim(std::atomic_flag& busy, bool wanted)
        : busy_(busy), won_(wanted && !busy.test_and_set(std::memory_order_acquire)) {}
    ~Claim() {
        if (won_) busy_.clear(std::memory_order_release);
    }
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;

    bool won() const { return won_; }

   private:
    std::atomic_flag& busy_;
    const bool won_;
};

// Tasks are taken one by one, not shared out: a thread that comes late, or whose core other work holds, takes fewer.
struct Region {
    const std::function<void(int64_t)>& task;
    const int64_t count;
    std::atomic<int64_t> next{0};

    void work() {
        const DefaultFloatingPoint defaults;
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
    }
};

}  // namespace

bool torch_threads_serve() { return Process::current().torch_parallel_for != nullptr; }

void parallel_for(int64_t count, int threads, bool own_threads, const std::function<void()>& prepare,
                  const std::function<void(int64_t)>& task) {
    Process& process = Process::current();
    const int useful = static_cast<int>(threads < count ? threads : count);
    const Claim claim(process.busy, useful > 1);
    prepare();
    Region region{task, count};
    if (claim.won()) {
        if (process.torch_parallel_for == nullptr || own_threads) {
            process.pool->run(useful, [&region] { region.work(); });
        } else {
            const auto work = [](int64_t, int64_t, void* context) { static_cast<Region*>(context)->work(); };
            process.torch_parallel_for(0, useful, 1, work, &region);
        }
    }
    region.work();
}

}  // namespace lookahead_fused
