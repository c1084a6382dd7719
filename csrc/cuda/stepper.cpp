#include "stepper.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../rules/all.h"
#include "../slow/all.h"
#include "../table/packed.h"
#include "device.h"

namespace lookahead_fused {
namespace {

std::string copied(size_t bytes, const char* what) {
    return "cudaMemcpyAsync of " + std::to_string(bytes) + " bytes (" + what + ") to the device";
}

// "adam of bfloat16 with float32 gradients and bfloat16 moments"
std::string name_of(const Kernel& kernel) {
    std::string name = std::string(kernel.rule) + " of " + kernel.param;
    if (kernel.grad != nullptr) name = name + " with " + kernel.grad + " gradients";
    if (kernel.state != nullptr)
        name = name + (kernel.grad != nullptr ? " and " : " with ") + kernel.state + " moments";
    return name;
}

// The graph that the stream is being captured into, or null.
cudaGraph_t capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    unsigned long long id;
    cudaGraph_t graph = nullptr;
    check(cudaStreamGetCaptureInfo(stream, &status, &id, &graph), "cudaStreamGetCaptureInfo");
    return status == cudaStreamCaptureStatusNone ? nullptr : graph;
}

// While another thread captures a graph, this needs leave: a module that is not loaded yet allocates memory.
void load(const Kernel& kernel, int device) {
    const MayWait allowed;
    check(kernel.load(), "loading the kernels of " + name_of(kernel) + " onto device " + std::to_string(device) +
                             " (this build has " LOOKAHEAD_FUSED_CUDA_ARCHITECTURES ")");
}

}  // namespace

const Kernel* find_kernel(const char* rule, Dtype param, Dtype grad, Dtype state) {
    const Kernel* found = nullptr;
    Rules::any([&](auto of) {
        using Rule = decltype(of);
        if (std::strcmp(rule, Rule::name) != 0) return false;
        found = param == Dtype::FLOAT64 ? find_walk<Rule, true>(param, grad, state)
                                        : find_walk<Rule, false>(param, grad, state);
        return true;
    });
    return found;
}

Sizes sizes(const Table& table, const Kernels& kernels) {
    const Packed packed(table);
    const size_t step_bytes = std::max(kernels.step.step_bytes, kernels.sync.step_bytes);
    return {packed.fixed + table.row_count * step_bytes, packed.moving};
}

Stepper::Stepper(const Table& table, const Kernels& kernels, int device, const Memory& memory, cudaStream_t stream)
    : kernels_(kernels), device_(device), memory_(memory), moving_(sizes(table, kernels).moving) {
    const DeviceGuard guard(device);
    load(kernels.step, device);
    load(kernels.sync, device);

    // The room for coefficients too: their padding is copied with them, and would pass for memory never written.
    upload_fixed(table, sizes(table, kernels).fixed, stream);

    const Packed packed(table);
    launch_.rows = reinterpret_cast<const Row*>(memory.fixed);
    launch_.policy = table.policy;
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
    send(table, arguments.pass, stream);
    launch(table, arguments, memory_.moving, stream);
}

void Stepper::capture(const Table& table, const StepArguments& arguments, std::byte* moving, cudaStream_t moving_stream,
                      cudaStream_t stream) {
    const DeviceGuard guard(device_);
    send_apart(table, arguments.pass, moving, moving_stream);
    launch(table, arguments, moving, stream);
}

void Stepper::sum_squares(const Table& table, const SquaresLaunch& launch, Dtype grad, cudaStream_t stream) {
    const DeviceGuard guard(device_);
    send(table, Pass::STEP, stream);
    launch_squares_of(table, launch, grad, memory_.moving, stream);
}

void Stepper::capture_squares(const Table& table, const SquaresLaunch& launch, Dtype grad, std::byte* moving,
                              cudaStream_t moving_stream, cudaStream_t stream) {
    const DeviceGuard guard(device_);
    send_apart(table, Pass::STEP, moving, moving_stream);
    launch_squares_of(table, launch, grad, moving, stream);
}

void Stepper::launch_squares_of(const Table& table, SquaresLaunch launch, Dtype grad, const std::byte* moving,
                                cudaStream_t stream) {
    launch.gradients = reinterpret_cast<void* const*>(moving + Packed(table).gradients);
    if (launch.block_count == 0) return;
    check(launch_squares(grad, launch, stream), "launch of the squares of gradients in " +
                                                    std::to_string(launch.block_count) + " blocks on device " +
                                                    std::to_string(device_));
}

void Stepper::update_fixed(const Table& table, cudaStream_t stream) {
    const DeviceGuard guard(device_);
    check_table(table);
    if (capturing(stream) != nullptr) {
        // Every replay would copy out of host memory that is gone.
        throw std::logic_error("rows and chunks cannot be sent again while their stream is being captured");
    }
    upload_fixed(table, Packed(table).fixed, stream);
}

void Stepper::check_table(const Table& table) const {
    if (table.row_count != launch_.row_count || table.chunk_count != launch_.chunk_count ||
        Packed(table).moving != moving_.size()) {
        throw std::logic_error("a stepper was given another table than it was made for");
    }
}

void Stepper::upload_fixed(const Table& table, size_t bytes, cudaStream_t stream) {
    std::vector<std::byte> fixed(bytes);
    pack_fixed(table, fixed.data());
    // Out of memory that is not pinned: the call returns when it has read it, and may wait for that.
    const MayWait allowed;
    check(cudaMemcpyAsync(memory_.fixed, fixed.data(), bytes, cudaMemcpyHostToDevice, stream),
          copied(bytes, "rows and chunks"));
}

void Stepper::gather(const Table& table, Pass pass) {
    check_table(table);
    pack_moving(table, pass, kernels_.of(pass).reads_gradient, moving_.data());
}

void Stepper::send(const Table& table, Pass pass, cudaStream_t stream) {
    gather(table, pass);
    if (!uploaded_ || std::memcmp(moving_.data(), on_device_.data(), moving_.size()) != 0) upload(stream);
}

void Stepper::send_apart(const Table& table, Pass pass, std::byte* moving, cudaStream_t moving_stream) {
    gather(table, pass);
    // Waited for: nothing orders the first replay, on whatever stream it is, after this.
    const MayWait allowed;
    check(cudaMemcpyAsync(moving, moving_.data(), moving_.size(), cudaMemcpyHostToDevice, moving_stream),
          copied(moving_.size(), "gradients and groups"));
    check(cudaStreamSynchronize(moving_stream), "cudaStreamSynchronize");
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
    const Kernel& kernel = kernels_.of(arguments.pass);
    check_launch(kernel.launch_rows(launch, row_blocks, stream), "row", kernel, row_blocks, ROW_THREADS);
    if (table.chunk_count == 0) return;
    const auto chunk_blocks = static_cast<unsigned>(table.chunk_count);
    check_launch(kernel.launch_chunks(launch, chunk_blocks, stream), "chunk", kernel, chunk_blocks, CHUNK_THREADS);
}

void Stepper::check_launch(cudaError_t error, const char* which, const Kernel& kernel, unsigned blocks,
                           int threads) const {
    if (error == cudaSuccess) return;
    check(error, std::string("launch of the ") + which + " kernel of " + name_of(kernel) + " in " +
                     std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads on device " +
                     std::to_string(device_));
}

SquaresLaunch upload(const NormLayout& plan, const std::byte* sent, Dtype grad, int device, std::byte* memory,
                     cudaStream_t stream) {
    const DeviceGuard guard(device);
    const MayWait allowed;
    check(load_norm(grad), "loading the kernels of a norm onto device " + std::to_string(device));
    check(cudaMemcpyAsync(memory, sent, plan.partial, cudaMemcpyHostToDevice, stream),
          copied(plan.partial, "blocks of a norm"));
    SquaresLaunch launch{};
    launch.blocks = reinterpret_cast<const Chunk*>(memory);
    launch.block_count = plan.count;
    launch.first_block = reinterpret_cast<const int64_t*>(memory + plan.first_block);
    launch.done = reinterpret_cast<unsigned*>(memory + plan.done);
    launch.partial = reinterpret_cast<double*>(memory + plan.partial);
    return launch;
}

void make_clip(const ClipArguments& launch, int device, cudaStream_t stream) {
    const DeviceGuard guard(device);
    check(launch_clip(launch, stream), "launch of a clip on device " + std::to_string(device));
}

void retain_for_graph(cudaStream_t stream, void* object, void (*release)(void*)) {
    cudaGraph_t graph;
    try {
        graph = capturing(stream);
    } catch (...) {
        release(object);
        throw;
    }
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
    load(*find_kernel(External::name, Dtype::FLOAT32, Dtype::FLOAT32, Dtype::FLOAT32), device);
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
