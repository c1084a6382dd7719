#include "blocks.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_on_host.h"
#include "traffic.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr size_t WARP = 32;

void run_fiber();

enum class WarpOperation { SYNC, FROM_NEIGHBOUR, FROM_FIRST_LANE, LARGEST, ANY };

enum class State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, FINISHED };

// A context sets a fiber up, once; from then on it is left and entered by jumps, since swapcontext asks the kernel for
// the signal mask each time, which took most of a kernel's run.
struct Fiber {
    ucontext_t context;
    jmp_buf left_at;
    bool started = false;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    void* fake_stack = nullptr;  // AddressSanitizer's
    State state = State::READY;
    // At which of a warp's operations this lane waits. Those of a warp wait at the same one.
    WarpOperation operation{};
    // What this lane gave the others, last and before that: nobody is two exchanges ahead.
    uint2 given[2];
    unsigned exchanges = 0;

    Fiber() {
        getcontext(&context);
        context.uc_stack.ss_sp = stack.data();
        context.uc_stack.ss_size = stack.size();
        context.uc_link = nullptr;
        makecontext(&context, run_fiber, 0);
    }
};

struct Block {
    jmp_buf scheduler;
    void* fake_stack = nullptr;
    const void* stack_bottom = nullptr;
    size_t stack_bytes = 0;
    std::vector<std::unique_ptr<Fiber>> fibers;
    size_t threads = 0;
    Fiber* current = nullptr;
    const std::function<void()>* thread = nullptr;
} block;

// At a barrier, or for good.
void leave_fiber(State state) {
    Fiber* const fiber = block.current;
    fiber->state = state;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber->fake_stack, block.stack_bottom, block.stack_bytes);
#endif
    if (_setjmp(fiber->left_at) == 0) _longjmp(block.scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.stack_bottom, &block.stack_bytes);
#endif
    for (;;) {
        (*block.thread)();
        leave_fiber(State::FINISHED);
    }
}

void enter_fiber(Fiber& fiber) {
    block.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.fake_stack, fiber.stack.data(), fiber.stack.size());
#endif
    if (_setjmp(block.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.left_at, 1);
        fiber.started = true;
        setcontext(&fiber.context);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
}

// Lets those from `begin` to `end` go on where they all wait at one barrier.
bool release(size_t begin, size_t end, State barrier) {
    const auto first = block.fibers.begin() + begin, last = block.fibers.begin() + end;
    const WarpOperation operation = (*first)->operation;
    const auto waits = [=](const auto& fiber) {
        return fiber->state == barrier && (barrier != State::AT_WARP_BARRIER || fiber->operation == operation);
    };
    if (!std::all_of(first, last, waits)) return false;
    std::for_each(first, last, [](const auto& fiber) { fiber->state = State::READY; });
    return true;
}

bool run_block(const std::vector<unsigned>& order) {
    const size_t threads = block.threads = order.size();
    while (block.fibers.size() < threads) block.fibers.push_back(std::make_unique<Fiber>());
    for (size_t i = 0; i < threads; ++i) {
        block.fibers[i]->state = State::READY;
        block.fibers[i]->exchanges = 0;
    }
    for (;;) {
        size_t finished = 0;
        for (const unsigned i : order) {
            Fiber& fiber = *block.fibers[i];
            if (fiber.state == State::READY) {
                threadIdx.x = i;
                enter_fiber(fiber);
            }
            finished += fiber.state == State::FINISHED;
        }
        if (finished == threads) return true;
        bool released = release(0, threads, State::AT_BLOCK_BARRIER);
        for (size_t lane = 0; lane < threads; lane += WARP) {
            released |= release(lane, std::min(lane + WARP, threads), State::AT_WARP_BARRIER);
        }
        if (!released) {
            block.fibers.clear();  // they would go on where they are stuck
            return false;
        }
    }
}

std::vector<unsigned> shuffled(unsigned count, unsigned seed) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    return order;
}

void wait_for_warp(WarpOperation operation) {
    block.current->operation = operation;
    leave_fiber(State::AT_WARP_BARRIER);
    end_run_of_accesses();
}

// What the lanes of a warp give each other: all have given theirs before any goes on.
class Exchange {
   public:
    Exchange(WarpOperation operation, uint2 given) : turn_(block.current->exchanges++ % 2) {
        block.current->given[turn_] = given;
        wait_for_warp(operation);
    }
    static size_t first() { return threadIdx.x / WARP * WARP; }
    static size_t end() { return std::min(first() + WARP, block.threads); }
    uint2 of_thread(size_t thread) const { return block.fibers[thread]->given[turn_]; }

   private:
    unsigned turn_;
};

}  // namespace

bool run_blocks(unsigned blocks, unsigned threads, const std::function<void()>& thread, unsigned order,
                const std::function<bool()>& after_block) {
    block.thread = &thread;
    for (const unsigned b : shuffled(blocks, order)) {
        blockIdx.x = b;
        if (!run_block(shuffled(threads, order == 0 ? 0 : order + b))) return false;
        if (!after_block()) break;
    }
    return true;
}

void __syncthreads() {
    leave_fiber(State::AT_BLOCK_BARRIER);
    end_run_of_accesses();
}

void __syncwarp() { wait_for_warp(WarpOperation::SYNC); }

uint2 from_neighbour(uint2 given) { return Exchange(WarpOperation::FROM_NEIGHBOUR, given).of_thread(threadIdx.x ^ 1); }

uint32_t from_first_lane(uint32_t given) {
    return Exchange(WarpOperation::FROM_FIRST_LANE, {given, 0}).of_thread(Exchange::first()).x;
}

uint32_t largest_in_warp(uint32_t own) {
    const Exchange exchange(WarpOperation::LARGEST, {own, 0});
    for (size_t i = Exchange::first(); i < Exchange::end(); ++i) own = std::max(own, exchange.of_thread(i).x);
    return own;
}

bool any_in_warp(bool own) {
    const Exchange exchange(WarpOperation::ANY, {own, 0});
    for (size_t i = Exchange::first(); i < Exchange::end(); ++i) own = own || exchange.of_thread(i).x != 0;
    return own;
}
