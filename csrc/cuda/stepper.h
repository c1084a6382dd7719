// A table on an NVIDIA GPU, and a pass over it: one copy at most, two launches.
//
// What is fixed for the life of a table (rows, chunks) is uploaded once, and again only where state lies elsewhere.
// What moves (the gradients' addresses, the groups' hyperparameters) is compared with what the device has, and uploaded
// in one piece where it differs. That is an asynchronous copy out of pinned memory: kernel arguments would save it for
// a small model, but hold 4 KB, and with 20,000 tensors a step would need forty more launches. In most training loops
// gradients keep their addresses, and nothing is copied at all.
#pragma once

#include <cstddef>
#include <vector>

#include "../table/norm_plan.h"
#include "../table/table.h"
#include "kernels.h"
#include "library.h"
#include "norm.h"

namespace lookahead_fused {

// Null where there is no such walk.
const Kernel* find_kernel(const char* rule, Dtype param, Dtype grad, Dtype state);

Sizes sizes(const Table& table, const Kernels& kernels);

// Sends a plan to memory on a device, and tells where its parts lie there.
SquaresLaunch upload(const NormLayout& plan, const std::byte* sent, Dtype grad, int device, std::byte* memory,
                     cudaStream_t stream);

class Stepper {
   public:
    // Throws where the device is none of those that the kernels are built for.
    Stepper(const Table& table, const Kernels& kernels, int device, const Memory& memory, cudaStream_t stream);
    ~Stepper();
    Stepper(const Stepper&) = delete;
    Stepper& operator=(const Stepper&) = delete;

    void step(const Table& table, const StepArguments& arguments, cudaStream_t stream);

    // The same into a stream that is being captured. A replay must find what was moving as it is now, whatever steps
    // are made meanwhile: the graph gets `moving` for itself, which has to live as long. That is filled here and now,
    // on a stream that is not captured, and not by the graph, where every replay would repeat the copy. So it must not
    // come from the graph's memory pool: there other tensors of the graph may lie in it before or after this step.
    void capture(const Table& table, const StepArguments& arguments, std::byte* moving, cudaStream_t moving_stream,
                 cudaStream_t stream);

    // Writes what the squares of each row's gradient add up to, to launch.sums: a pass of its own before a step's.
    void sum_squares(const Table& table, const SquaresLaunch& launch, Dtype grad, cudaStream_t stream);

    // The same into a stream that is being captured; `moving` is as above.
    void capture_squares(const Table& table, const SquaresLaunch& launch, Dtype grad, std::byte* moving,
                         cudaStream_t moving_stream, cudaStream_t stream);

    // Sends rows and chunks again, as many as there were: a tensor of a row's state lies elsewhere than before.
    // Captured graphs read them too in their next replay. Throws where the stream is being captured.
    void update_fixed(const Table& table, cudaStream_t stream);

   private:
    struct Slot {
        cudaEvent_t copied = nullptr;
        bool in_flight = false;
    };

    void destroy_events();
    void check_table(const Table& table) const;
    void upload_fixed(const Table& table, size_t bytes, cudaStream_t stream);
    void gather(const Table& table, Pass pass);
    // Has `moving` on the device as it is now.
    void send(const Table& table, Pass pass, cudaStream_t stream);
    void send_apart(const Table& table, Pass pass, std::byte* moving, cudaStream_t moving_stream);
    void upload(cudaStream_t stream);
    void launch_squares_of(const Table& table, SquaresLaunch launch, Dtype grad, const std::byte* moving,
                           cudaStream_t stream);
    void launch(const Table& table, const StepArguments& arguments, const std::byte* moving, cudaStream_t stream);
    void check_launch(cudaError_t error, const char* which, const Kernel& kernel, unsigned blocks, int threads) const;

    const Kernels kernels_;
    const int device_;
    const Memory memory_;
    Launch launch_{};
    std::vector<std::byte> moving_;     // as this step has it
    std::vector<std::byte> on_device_;  // as the device has it, where `uploaded_`
    bool uploaded_ = false;
    Slot slots_[RING];
    int next_ = 0;
};

// Keeps `object` until the graph that the stream is being captured into, and all that was made of it, is destroyed;
// `release` is called then, on any thread, and must not call CUDA. It is called at once where this throws.
void retain_for_graph(cudaStream_t stream, void* object, void (*release)(void*));

// What the sums come to, on the current stream of a device.
void make_clip(const ClipArguments& launch, int device, cudaStream_t stream);

// Throws, with the driver's reason, where it has no kernels for a device. It makes a context there.
void load_kernels(int device);

// How many devices the runtime sees. Throws where it cannot tell, with the reason.
int device_count();

}  // namespace lookahead_fused
