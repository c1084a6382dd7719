#include "cuda_on_host.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/floating_point.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

using Operation = std::function<cudaError_t()>;

struct StandInStream {
    std::vector<Operation> pending;
    StandInGraph* capturing = nullptr;
};
struct StandInEvent {
    cudaStream_t stream = nullptr;
    size_t after = 0;  // how many operations of the stream it waits for
};
struct StandInUserObject {
    void* pointer;
    void (*release)(void*);
};
struct StandInGraph {
    std::vector<Operation> operations;
    std::vector<StandInUserObject*> retained;
};

namespace {

struct Range {
    uintptr_t begin, end;
    int64_t read, written;
};

// All that the tests set and ask, in one place.
struct Control {
    std::string calls;     // names, one line each
    int64_t count = 0;     // of calls
    int64_t fail_at = -1;  // the number of the call that fails
    int64_t live = 0;      // events and user objects
    unsigned order = 0;    // 0: blocks and threads in order; else a seed to shuffle them by
    bool late = false;     // operations wait on their stream
    bool idle = false;     // kernels do nothing
    int device = 0;
    std::vector<Range> watched;
    int64_t elsewhere = 0;  // accesses outside of what is watched
    std::vector<std::pair<uintptr_t, uintptr_t>> pinned;
    std::vector<cudaStream_t> streams;
    int capturing = 0;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    cudaError_t fault = cudaSuccess;  // of the kernel that is running
} control;

cudaError_t enter(const char* name) {
    control.calls += name;
    control.calls += '\n';
    return control.count++ == control.fail_at ? cudaErrorMemoryAllocation : cudaSuccess;
}

#define ENTER(name)                                   \
    do {                                              \
        const cudaError_t injected = enter(name);     \
        if (injected != cudaSuccess) return injected; \
    } while (false)

StandInStream& real(cudaStream_t stream) {
    static StandInStream default_stream;
    return stream == nullptr ? default_stream : *stream;
}

cudaError_t submit(cudaStream_t handle, Operation operation) {
    StandInStream& stream = real(handle);
    if (stream.capturing != nullptr) {
        stream.capturing->operations.push_back(std::move(operation));
        return cudaSuccess;
    }
    if (!control.late) return operation();
    stream.pending.push_back(std::move(operation));
    return cudaSuccess;
}

cudaError_t drain(StandInStream& stream) {
    const auto pending = std::move(stream.pending);
    stream.pending.clear();
    cudaError_t first = cudaSuccess;
    for (const Operation& operation : pending) {
        const cudaError_t error = operation();
        if (first == cudaSuccess) first = error;
    }
    return first;
}

bool may_wait() { return control.capturing == 0 || control.mode == cudaStreamCaptureModeRelaxed; }

// ---- a block: a fiber for each thread --------------------------------------------------------------------------

constexpr size_t STACK_BYTES = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK_BYTES);
    void* fake_stack = nullptr;  // AddressSanitizer's
    bool finished = false, at_barrier = false;
};

struct Block {
    ucontext_t scheduler;
    void* fake_stack = nullptr;
    const void* stack_bottom = nullptr;
    size_t stack_bytes = 0;
    Fiber* current = nullptr;
    const std::function<void()>* thread = nullptr;
} block;

void leave_fiber() {
    Fiber* const fiber = block.current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber->finished ? nullptr : &fiber->fake_stack, block.stack_bottom,
                                   block.stack_bytes);
#endif
    swapcontext(&fiber->context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber->fake_stack, nullptr, nullptr);
#endif
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.stack_bottom, &block.stack_bytes);
#endif
    (*block.thread)();
    block.current->finished = true;
    leave_fiber();
}

void enter_fiber(Fiber& fiber) {
    block.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&block.fake_stack, fiber.stack.data(), fiber.stack.size());
#endif
    swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(block.fake_stack, nullptr, nullptr);
#endif
}

void run_block(const std::vector<unsigned>& order) {
    static std::vector<std::unique_ptr<Fiber>> fibers;
    while (fibers.size() < order.size()) fibers.push_back(std::make_unique<Fiber>());
    for (size_t i = 0; i < order.size(); ++i) {
        Fiber& fiber = *fibers[i];
        fiber.finished = fiber.at_barrier = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (;;) {
        size_t finished = 0, waiting = 0;
        for (const unsigned i : order) {
            Fiber& fiber = *fibers[i];
            fiber.at_barrier = false;
            if (!fiber.finished) {
                threadIdx.x = i;
                enter_fiber(fiber);
            }
            finished += fiber.finished;
            waiting += fiber.at_barrier;
        }
        if (waiting == 0) return;
        // Some threads wait for others that have left.
        if (finished > 0) {
            control.fault = cudaErrorLaunchFailure;
            return;
        }
    }
}

std::vector<unsigned> shuffled(unsigned count, unsigned seed) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (seed != 0) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    return order;
}

}  // namespace

void __syncthreads() {
    block.current->at_barrier = true;
    leave_fiber();
}

namespace stand_in {

cudaError_t load_kernel() { return enter("cudaFuncGetAttributes"); }

cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
    ENTER("cudaLaunchKernelEx");
    const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
    if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > 1024) return cudaErrorInvalidValue;
    return submit(config.stream, [=] {
        if (control.idle) return cudaSuccess;
        const lookahead_fused::DefaultFloatingPoint defaults;
        control.fault = cudaSuccess;
        block.thread = &thread;
        for (const unsigned b : shuffled(blocks, control.order)) {
            blockIdx.x = b;
            run_block(shuffled(threads, control.order == 0 ? 0 : control.order + b));
            if (control.fault != cudaSuccess) break;
        }
        return control.fault;
    });
}

void access(const void* pointer, size_t bytes, bool write) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    if (address % bytes != 0) control.fault = cudaErrorMisalignedAddress;
    if (control.watched.empty()) return;
    for (Range& range : control.watched) {
        if (address >= range.begin && address + bytes <= range.end) {
            (write ? range.written : range.read) += static_cast<int64_t>(bytes);
            return;
        }
    }
    ++control.elsewhere;
}

}  // namespace stand_in

// ---- the runtime -----------------------------------------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation    ? "out of memory"
           : error == cudaErrorMisalignedAddress ? "misaligned address"
                                                 : "another error";
}

const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation           ? "cudaErrorMemoryAllocation"
           : error == cudaErrorMisalignedAddress        ? "cudaErrorMisalignedAddress"
           : error == cudaErrorStreamCaptureUnsupported ? "cudaErrorStreamCaptureUnsupported"
           : error == cudaErrorLaunchFailure            ? "cudaErrorLaunchFailure"
                                                        : "cudaErrorInvalidValue";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
    ENTER("cudaGetDeviceCount");
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    ENTER("cudaGetDevice");
    *device = control.device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    ENTER("cudaSetDevice");
    control.device = device;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    ENTER("cudaMemcpyAsync");
    const auto address = reinterpret_cast<uintptr_t>(from);
    for (const auto& [begin, end] : control.pinned) {
        if (address >= begin && address + bytes <= end) {
            return submit(stream, [=] {
                std::memcpy(to, from, bytes);
                return cudaSuccess;
            });
        }
    }
    // Out of pageable memory: read now, and forbidden where it would have to be read again.
    if (real(stream).capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
    const std::vector<char> staged(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
    return submit(stream, [=] {
        if (bytes > 0) std::memcpy(to, staged.data(), bytes);
        return cudaSuccess;
    });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ENTER("cudaStreamSynchronize");
    return may_wait() ? drain(real(stream)) : cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph) {
    ENTER("cudaStreamGetCaptureInfo");
    *graph = real(stream).capturing;
    *status = *graph != nullptr ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    *id = reinterpret_cast<uintptr_t>(*graph);
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    ENTER("cudaThreadExchangeStreamCaptureMode");
    std::swap(control.mode, *mode);
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    ENTER("cudaEventCreateWithFlags");
    *event = new StandInEvent;
    ++control.live;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ENTER("cudaEventRecord");
    if (real(stream).capturing != nullptr) return cudaErrorStreamCaptureUnsupported;
    event->stream = stream;
    event->after = real(stream).pending.size();
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ENTER("cudaEventSynchronize");
    if (!may_wait()) return cudaErrorStreamCaptureUnsupported;
    return event->after > 0 ? drain(real(event->stream)) : cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    ENTER("cudaEventDestroy");
    delete event;
    --control.live;
    return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, void (*release)(void*), unsigned, unsigned) {
    ENTER("cudaUserObjectCreate");
    *object = new StandInUserObject{pointer, release};
    ++control.live;
    return cudaSuccess;
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
    ENTER("cudaUserObjectRelease");
    object->release(object->pointer);
    delete object;
    --control.live;
    return cudaSuccess;
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
    ENTER("cudaGraphRetainUserObject");
    if (graph == nullptr) return cudaErrorInvalidValue;
    graph->retained.push_back(object);
    return cudaSuccess;
}

// ---- what the tests call, by ctypes ----------------------------------------------------------------------------

#define CONTROL extern "C" __attribute__((visibility("default")))

CONTROL void control_reset() {
    control.calls.clear();
    control.count = 0;
    control.fail_at = -1;
    control.order = 0;
    control.late = control.idle = false;
    control.device = 0;
    control.watched.clear();
    control.elsewhere = 0;
}
CONTROL const char* control_calls() { return control.calls.c_str(); }
CONTROL int64_t control_live() { return control.live; }
CONTROL void control_fail_at(int64_t call) { control.fail_at = call; }
CONTROL void control_order(unsigned seed) { control.order = seed; }
CONTROL void control_late(bool late) { control.late = late; }
CONTROL void control_idle(bool idle) { control.idle = idle; }
CONTROL int control_device() { return control.device; }
CONTROL void control_set_device(int device) { control.device = device; }
CONTROL void control_watch(uintptr_t address, int64_t bytes) {
    control.watched.push_back({address, address + bytes, 0, 0});
}
CONTROL int64_t control_read(int range) { return control.watched.at(range).read; }
CONTROL int64_t control_written(int range) { return control.watched.at(range).written; }
CONTROL int64_t control_elsewhere() { return control.elsewhere; }
CONTROL void control_pinned(uintptr_t address, int64_t bytes) { control.pinned.emplace_back(address, address + bytes); }
CONTROL void control_unpinned(uintptr_t address) {
    auto& pinned = control.pinned;
    pinned.erase(std::remove_if(pinned.begin(), pinned.end(), [=](const auto& p) { return p.first == address; }),
                 pinned.end());
}
CONTROL StandInStream* control_make_stream() { return new StandInStream; }
CONTROL void control_destroy_stream(StandInStream* stream) { delete stream; }
CONTROL int control_drain(StandInStream* stream) { return drain(real(stream)); }
CONTROL void control_begin_capture(StandInStream* stream) {
    real(stream).capturing = new StandInGraph;
    ++control.capturing;
}
CONTROL StandInGraph* control_end_capture(StandInStream* stream) {
    --control.capturing;
    return std::exchange(real(stream).capturing, nullptr);
}
CONTROL bool control_is_capturing(StandInStream* stream) { return real(stream).capturing != nullptr; }
CONTROL int control_replay(StandInGraph* graph) {
    for (const Operation& operation : graph->operations) {
        const cudaError_t error = operation();
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}
CONTROL void control_destroy_graph(StandInGraph* graph) {
    for (StandInUserObject* object : graph->retained) {
        object->release(object->pointer);
        delete object;
        --control.live;
    }
    delete graph;
}
