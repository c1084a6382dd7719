// The runtime's functions, on the host: streams, events, captures, errors. Kernels run in blocks.cpp.
#include "cuda_on_host.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "blocks.h"
#include "control.h"
#include "cpu/floating_point.h"
#include "traffic.h"

using Operation = std::function<cudaError_t()>;

struct StandInStream {
    int device = 0;
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
    unsigned contexts = 0;  // a bit for each device that has one
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

// The default stream is every device's own.
bool is_of_another_device(cudaStream_t stream) { return stream != nullptr && stream->device != control.device; }

cudaError_t submit(cudaStream_t handle, Operation operation) {
    if (is_of_another_device(handle)) return cudaErrorInvalidResourceHandle;
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

void make_current(int device) {
    control.device = device;
    control.contexts |= 1u << device;
}

bool may_wait() { return control.capturing == 0 || control.mode == cudaStreamCaptureModeRelaxed; }

}  // namespace

namespace stand_in {

cudaError_t load_kernel() {
    ENTER("cudaFuncGetAttributes");
    make_current(control.device);
    return may_wait() ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> thread) {
    ENTER("cudaLaunchKernelEx");
    const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
    if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads > 1024) return cudaErrorInvalidValue;
    return submit(config.stream, [=] {
        if (control.idle) return cudaSuccess;
        const lookahead_fused::DefaultFloatingPoint defaults;
        control.fault = cudaSuccess;
        const bool finished = run_blocks(blocks, threads, thread, control.order, [] {
            end_block_of_traffic();
            return control.fault == cudaSuccess;
        });
        if (!finished) control.fault = cudaErrorLaunchFailure;
        return control.fault;
    });
}

void access(const void* pointer, size_t bytes, bool write) {
    if (!note_access(reinterpret_cast<uintptr_t>(pointer), bytes, write)) control.fault = cudaErrorMisalignedAddress;
}

}  // namespace stand_in

// ---- the runtime -----------------------------------------------------------------------------------------------

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation        ? "out of memory"
           : error == cudaErrorMisalignedAddress     ? "misaligned address"
           : error == cudaErrorInvalidResourceHandle ? "invalid resource handle"
                                                     : "another error";
}

const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation           ? "cudaErrorMemoryAllocation"
           : error == cudaErrorMisalignedAddress        ? "cudaErrorMisalignedAddress"
           : error == cudaErrorStreamCaptureUnsupported ? "cudaErrorStreamCaptureUnsupported"
           : error == cudaErrorInvalidResourceHandle    ? "cudaErrorInvalidResourceHandle"
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
    make_current(device);
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
    // Out of pageable memory: read now, and forbidden where it would have to be read again, or waited for.
    if (real(stream).capturing != nullptr || !may_wait()) return cudaErrorStreamCaptureUnsupported;
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

CONTROL void control_reset() {
    control.calls.clear();
    control.count = 0;
    control.fail_at = -1;
    control.order = 0;
    control.late = control.idle = false;
    control.device = 0;
    control.contexts = 0;
    forget_traffic();
}
CONTROL const char* control_calls() { return control.calls.c_str(); }
CONTROL int64_t control_live() { return control.live; }
CONTROL void control_fail_at(int64_t call) { control.fail_at = call; }
CONTROL void control_order(unsigned seed) { control.order = seed; }
CONTROL void control_late(bool late) { control.late = late; }
CONTROL void control_idle(bool idle) { control.idle = idle; }
CONTROL int control_device() { return control.device; }
CONTROL void control_set_device(int device) { control.device = device; }
// False where the driver would refuse it.
CONTROL bool control_pin(uintptr_t address, int64_t bytes) {
    if (!may_wait()) return false;
    control.pinned.emplace_back(address, address + bytes);
    return true;
}
CONTROL void control_unpin(uintptr_t address) {
    auto& pinned = control.pinned;
    pinned.erase(std::remove_if(pinned.begin(), pinned.end(), [=](const auto& p) { return p.first == address; }),
                 pinned.end());
}
CONTROL StandInStream* control_make_stream(int device) {
    auto* const stream = new StandInStream;
    stream->device = device;
    return stream;
}
CONTROL void control_destroy_stream(StandInStream* stream) { delete stream; }
CONTROL int control_drain(StandInStream* stream) { return drain(real(stream)); }
CONTROL unsigned control_contexts() { return control.contexts; }
// As torch's guard goes to a device, and back: without a context on the one that it came from, it stays.
CONTROL int control_go_to_device(int device) {
    const int before = control.device;
    make_current(device);
    return before;
}
CONTROL void control_go_back_to_device(int device) {
    if ((control.contexts >> device & 1u) != 0) make_current(device);
}
CONTROL void control_begin_capture(StandInStream* stream) {
    real(stream).capturing = new StandInGraph;
    ++control.capturing;
}
CONTROL StandInGraph* control_end_capture(StandInStream* stream) {
    --control.capturing;
    return std::exchange(real(stream).capturing, nullptr);
}
CONTROL bool control_is_capturing(StandInStream* stream) { return real(stream).capturing != nullptr; }
CONTROL int64_t control_nodes(StandInGraph* graph) { return static_cast<int64_t>(graph->operations.size()); }
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
