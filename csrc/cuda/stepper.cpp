#include "stepper.h"

#include <cstring>

#include "../rules/adam.h"
#include "../rules/sgd.h"
#include "../rules/sync.h"
#include "../table/packed.h"
#include "device.h"

namespace lookahead_fused {
namespace {

std::string copied(size_t bytes, const char* what) {
    return "cudaMemcpyAsync of " + std::to_string(bytes) + " bytes (" + what + ") to the device";
}

// While another thread captures a graph, this needs leave: a module that is not loaded yet allocates memory.
void load(const Kernel& kernel, int device) {
    const MayWait allowed;
    check(kernel.load(), std::string("loading the kernels of ") + kernel.name + " onto device " +
                             std::to_string(device) + " (this build has " LOOKAHEAD_FUSED_CUDA_ARCHITECTURES ")");
}

}  // namespace

const Kernel* find_kernel(const std::string& rule, Dtype param, Dtype grad) {
    if (rule == Adam::name) return param == Dtype::FLOAT64 ? find_adam_fp64(param, grad) : find_adam(param, grad);
    if (rule == Sgd::name) return find_sgd(param, grad);
    if (rule == SyncOnly::name) return find_sync(param);
    return nullptr;
}

Sizes sizes(const Table& table, const Kernel& kernel) {
    const Packed packed(table);
    return {packed.fixed + table.row_count * kernel.step_bytes, packed.moving};
}

Stepper::Stepper(const Table& table, const Kernel& kernel, int device, const Memory& memory, cudaStream_t stream)
    : kernel_(kernel), device_(device), memory_(memory), moving_(sizes(table, kernel).moving) {
    const DeviceGuard guard(device);
    load(kernel, device);

    // The room for coefficients too: their padding is copied with them, and would pass for memory never written.
    std::vector<std::byte> fixed(sizes(table, kernel).fixed);
    pack_fixed(table, fixed.data());
    {
        // Out of memory that is not pinned: the call returns when it has read it, and may wait for that.
        const MayWait allowed;
        check(cudaMemcpyAsync(memory.fixed, fixed.data(), fixed.size(), cudaMemcpyHostToDevice, stream),
              copied(fixed.size(), "rows and chunks"));
    }

    const Packed packed(table);
    launch_.rows = reinterpret_cast<const Row*>(memory.fixed);
    launch_.row_count = table.row_count;
    launch_.chunks = reinterpret_cast<const Chunk*>(memory.fixed + packed.chunks);
    launch_.chunk_count = table.chunk_count;
    launch_.steps = memory.fixed + packed.fixed;

    try {
        for (Slot& slot : slots_) {
            check(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "cudaEventCreateWithFlags");
        }
    } catch (...) {
        destroy_events();
        throw;
    }
}

Stepper::~Stepper() {
    // At the end of the process the driver may be gone before this; whatever it answers, there is nothing to be done.
    const MayWait allowed;
    for (Slot& slot : slots_) {
        // The pinned memory goes back to its allocator, which knows nothing of copies that still read it.
        if (slot.in_flight) cudaEventSynchronize(slot.copied);
    }
    destroy_events();
    cudaGetLastError();
}

void Stepper::destroy_events() {
    for (Slot& slot : slots_) {
        if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
    }
}

void Stepper::step(const Table& table, const StepArguments& arguments, cudaStream_t stream) {
    const DeviceGuard guard(device_);
    gather(table);
    if (!uploaded_ || std::memcmp(moving_.data(), on_device_.data(), moving_.size()) != 0) upload(stream);
    launch(table, arguments, memory_.moving, stream);
}

void Stepper::capture(const Table& table, const StepArguments& arguments, std::byte* moving, std::byte* pinned,
                      cudaStream_t stream) {
    const DeviceGuard guard(device_);
    gather(table);
    std::memcpy(pinned, moving_.data(), moving_.size());
    check(cudaMemcpyAsync(moving, pinned, moving_.size(), cudaMemcpyHostToDevice, stream),
          copied(moving_.size(), "gradients and groups"));
    launch(table, arguments, moving, stream);
}

void Stepper::gather(const Table& table) {
    if (table.row_count != launch_.row_count || table.chunk_count != launch_.chunk_count) {
        throw std::logic_error("a stepper was given another table than it was made for");
    }
    pack_moving(table, kernel_.reads_gradient, moving_.data());
}

void Stepper::upload(cudaStream_t stream) {
    Slot& slot = slots_[next_];
    if (slot.in_flight) {
        const MayWait allowed;
        check(cudaEventSynchronize(slot.copied), "cudaEventSynchronize");
        slot.in_flight = false;
    }
    std::byte* const pinned = memory_.pinned + next_ * moving_.size();
    std::memcpy(pinned, moving_.data(), moving_.size());
    uploaded_ = false;
    check(cudaMemcpyAsync(memory_.moving, pinned, moving_.size(), cudaMemcpyHostToDevice, stream),
          copied(moving_.size(), "gradients and groups"));
    const cudaError_t recorded = cudaEventRecord(slot.copied, stream);
    if (recorded != cudaSuccess) {
        // Nothing would tell when the slot may be written again.
        const MayWait allowed;
        cudaStreamSynchronize(stream);
    }
    check(recorded, "cudaEventRecord");
    slot.in_flight = true;
    next_ = (next_ + 1) % RING;
    on_device_ = moving_;
    uploaded_ = true;
}

void Stepper::launch(const Table& table, const StepArguments& arguments, const std::byte* moving, cudaStream_t stream) {
    Launch launch = launch_;
    launch.groups = reinterpret_cast<const Group*>(moving);
    launch.gradients = reinterpret_cast<void* const*>(moving + Packed(table).gradients);
    launch.arguments = arguments;
    if (table.row_count == 0) return;
    const auto row_blocks = static_cast<unsigned>((table.row_count + ROW_THREADS - 1) / ROW_THREADS);
    check_launch(kernel_.launch_rows(launch, row_blocks, stream), "row", row_blocks, ROW_THREADS);
    if (table.chunk_count == 0) return;
    const auto chunk_blocks = static_cast<unsigned>(table.chunk_count);
    check_launch(kernel_.launch_chunks(launch, chunk_blocks, stream), "chunk", chunk_blocks, CHUNK_THREADS);
}

void Stepper::check_launch(cudaError_t error, const char* kernel, unsigned blocks, int threads) const {
    if (error == cudaSuccess) return;
    check(error, std::string("launch of the ") + kernel + " kernel of " + kernel_.name + " in " +
                     std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads on device " +
                     std::to_string(device_));
}

void retain_for_graph(cudaStream_t stream, void* object, void (*release)(void*)) {
    cudaStreamCaptureStatus status;
    unsigned long long id;
    cudaGraph_t graph = nullptr;
    const cudaError_t found = cudaStreamGetCaptureInfo(stream, &status, &id, &graph);
    if (found != cudaSuccess) release(object);
    check(found, "cudaStreamGetCaptureInfo");
    cudaUserObject_t held;
    cudaError_t error = cudaUserObjectCreate(&held, object, release, 1, cudaUserObjectNoDestructorSync);
    if (error != cudaSuccess) release(object);
    check(error, "cudaUserObjectCreate");
    error = cudaGraphRetainUserObject(graph, held, 1, cudaGraphUserObjectMove);
    if (error != cudaSuccess) cudaUserObjectRelease(held, 1);
    check(error, "cudaGraphRetainUserObject");
}

void load_kernels(int device) {
    const DeviceGuard guard(device);
    load(*find_adam(Dtype::FLOAT32, Dtype::FLOAT32), device);
}

int device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorNoDevice) {
        cudaGetLastError();
        return 0;
    }
    check(error, "cudaGetDeviceCount");
    return count;
}

}  // namespace lookahead_fused
