// What csrc/cuda gives out to the bindings.
//
// In a wheel for several Pythons it is a library of its own (CMakeLists.txt), and that library has a C++ library linked
// into it, as each of the modules has. Neither side knows the other's exceptions, and an exception that left one for
// the other would end the process. So what crosses is numbers, addresses and plain structs, by the functions of one
// table; a call that fails says so in a Fault, and `call` throws it again on this side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "../table/norm_plan.h"
#include "../table/table.h"
#include "kernels.h"
#include "norm.h"
#include "runtime.h"

namespace lookahead_fused {

class Stepper;
class MayWait;

// What a table's passes are made with.
struct Kernels {
    const Kernel& step;
    const Kernel& sync;  // External's, of the same parameters

    const Kernel& of(Pass pass) const { return pass == Pass::STEP ? step : sync; }
};

// How many copies may be under way before the host waits for the device.
constexpr int RING = 4;

// Bytes that a table needs on the device, and once more RING times `moving` of pinned memory.
struct Sizes {
    size_t fixed, moving;
};

// Allocated by the caller, and kept until the stepper is gone.
struct Memory {
    std::byte* fixed;
    std::byte* moving;
    std::byte* pinned;
};

// How a call failed.
struct Fault {
    enum class Kind : int32_t { NONE, MEMORY, OTHER };

    Kind kind = Kind::NONE;
    char what[1024];  // set with `kind`, and cut where it is longer

    void raise() const {
        if (kind == Kind::MEMORY) throw std::bad_alloc();
        if (kind == Kind::OTHER) throw std::runtime_error(what);
    }
};

// The functions of stepper.h and device.h that the bindings call, by their names there; what each promises stands there
// too.
struct Library {
    const Kernel* (*find_kernel)(Fault&, const char* rule, Dtype param, Dtype grad, Dtype state);
    Sizes (*sizes)(Fault&, const Table&, const Kernels&);
    SquaresLaunch (*upload)(Fault&, const NormLayout&, const std::byte* sent, Dtype grad, int device, std::byte* memory,
                            cudaStream_t);
    void (*make_clip)(Fault&, const ClipArguments&, int device, cudaStream_t);
    void (*retain_for_graph)(Fault&, cudaStream_t, void* object, void (*release)(void*));
    void (*load_kernels)(Fault&, int device);
    int (*device_count)(Fault&);

    Stepper* (*make_stepper)(Fault&, const Table&, const Kernels&, int device, const Memory&, cudaStream_t);
    void (*delete_stepper)(Stepper*);
    void (*step)(Fault&, Stepper&, const Table&, const StepArguments&, cudaStream_t);
    void (*capture)(Fault&, Stepper&, const Table&, const StepArguments&, std::byte* moving, cudaStream_t moving_stream,
                    cudaStream_t);
    void (*sum_squares)(Fault&, Stepper&, const Table&, const SquaresLaunch&, Dtype grad, cudaStream_t);
    void (*capture_squares)(Fault&, Stepper&, const Table&, const SquaresLaunch&, Dtype grad, std::byte* moving,
                            cudaStream_t moving_stream, cudaStream_t);
    void (*update_fixed)(Fault&, Stepper&, const Table&, cudaStream_t);

    // The scope of a MayWait, from the one call to the other.
    MayWait* (*make_may_wait)(Fault&);
    void (*delete_may_wait)(MayWait*);
};

// The one symbol that the library shows.
#pragma GCC visibility push(default)
const Library& cuda_library();
#pragma GCC visibility pop

// Calls a function of the table: call(&Library::step, ...). Throws std::bad_alloc or std::runtime_error where it fails.
template <class Result, class... Parameters, class... Arguments>
Result call(Result (*Library::*function)(Fault&, Parameters...), Arguments&&... arguments) {
    Fault fault;
    if constexpr (std::is_void_v<Result>) {
        (cuda_library().*function)(fault, std::forward<Arguments>(arguments)...);
        fault.raise();
    } else {
        const Result result = (cuda_library().*function)(fault, std::forward<Arguments>(arguments)...);
        fault.raise();
        return result;
    }
}

// What the library made, and alone can delete.
template <class Object, void (*Library::*function)(Object*)>
struct Deleted {
    void operator()(Object* object) const { (cuda_library().*function)(object); }
};
using OwnedStepper = std::unique_ptr<Stepper, Deleted<Stepper, &Library::delete_stepper>>;
using OwnedMayWait = std::unique_ptr<MayWait, Deleted<MayWait, &Library::delete_may_wait>>;

}  // namespace lookahead_fused
