// lookahead_fused._cuda: the table, and a step over it on an NVIDIA GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <vector>

#include "../cuda/library.h"
#include "../rules/external.h"
#include "addresses.h"
#include "table_binding.h"
#include "watch.h"

// Where the tensors lie, in DLPack's numbers: CUDA memory, but for the tests' stand-in.
#if !defined(LOOKAHEAD_FUSED_DLPACK_DEVICE)
#define LOOKAHEAD_FUSED_DLPACK_DEVICE 2
#endif

namespace lookahead_fused {
namespace {

cudaStream_t stream_of(uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

Kernels kernels_for(const TableBinding& table) {
    const auto find = [&](const char* rule, Dtype grad) {
        return call(&Library::find_kernel, rule, table.param_dtype(), grad, table.state_dtype());
    };
    const Kernel* step = find(table.rule().c_str(), table.grad_dtype());
    if (step == nullptr) throw py::value_error("rule '" + table.rule() + "' has no CUDA walk for these dtypes");
    return {*step, *find(External::name, table.param_dtype())};
}

StepArguments arguments_of(const TableBinding& table, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip) {
    return {pointer<float>(grad_scale), pointer<float>(found_inf), pointer<double>(clip), table.pass(),
            table.event_later()};
}

// What captured graphs held and let go of. They do so on any thread and in the midst of calls to CUDA, where no Python
// object may be freed. So Python is asked to have its main thread do it between two instructions; while that thread is
// in a long call, whoever makes, runs or deletes a stepper is first, and until then the memory stays allocated.
class Dropped {
   public:
    static void add(void* object) {
        const std::lock_guard<std::mutex> lock(mutex());
        objects().push_back(static_cast<PyObject*>(object));
        // Needs no GIL and calls no CUDA. There is room for 32 calls of all extensions: one is enough for all objects,
        // and where it finds no room the next object asks again. At the end of the process there is nobody to ask.
        if (!asked() && Py_IsInitialized()) asked() = Py_AddPendingCall(&release_later, nullptr) == 0;
    }
    // To be called with the GIL held.
    static void release() {
        std::vector<PyObject*> taken;
        {
            const std::lock_guard<std::mutex> lock(mutex());
            taken.swap(objects());
        }
        for (PyObject* object : taken) Py_DECREF(object);
    }

   private:
    static int release_later(void*) {
        {
            const std::lock_guard<std::mutex> lock(mutex());
            asked() = false;
        }
        release();
        return 0;
    }
    static bool& asked() {
        static bool instance = false;
        return instance;
    }
    static std::mutex& mutex() {
        static auto* const instance = new std::mutex;
        return *instance;
    }
    static std::vector<PyObject*>& objects() {
        static auto* const instance = new std::vector<PyObject*>;
        return *instance;
    }
};

// `owners` is kept as long as the graph that the stream is being captured into.
void keep_for_graph(uintptr_t stream, py::object owners) {
    call(&Library::retain_for_graph, stream_of(stream), owners.release().ptr(), &Dropped::add);
}

// Addresses and stream handles are Python ints, 0 where there is none. `owners` is whatever keeps the memory alive.
class StepperBinding {
   public:
    StepperBinding(const TableBinding& table, int device, uintptr_t fixed, uintptr_t moving, uintptr_t pinned,
                   uintptr_t stream, py::object owners)
        : owners_(std::move(owners)) {
        Dropped::release();
        const Table view = table.view();
        if (view.row_count > 0 &&
            (table.device_type() != LOOKAHEAD_FUSED_DLPACK_DEVICE || table.device_id() != device)) {
            throw py::value_error("the CUDA backend was given a table of tensors on another device");
        }
        const Memory memory{pointer(fixed), pointer(moving), pointer(pinned)};
        stepper_.reset(call(&Library::make_stepper, view, kernels_for(table), device, memory, stream_of(stream)));
    }

    ~StepperBinding() { Dropped::release(); }
    StepperBinding(const StepperBinding&) = delete;
    StepperBinding& operator=(const StepperBinding&) = delete;

    static std::pair<size_t, size_t> sizes(const TableBinding& table) {
        const Sizes sizes = call(&Library::sizes, table.view(), kernels_for(table));
        return {sizes.fixed, sizes.moving};
    }

    void step(const TableBinding& table, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip, uintptr_t stream) {
        Dropped::release();
        const Table view = table.view();
        const py::gil_scoped_release released;
        call(&Library::step, *stepper_, view, arguments_of(table, grad_scale, found_inf, clip), stream_of(stream));
    }

    void update_fixed(const TableBinding& table, uintptr_t stream) {
        call(&Library::update_fixed, *stepper_, table.view(), stream_of(stream));
    }

    // `owners` is kept as long as the graph.
    void capture(const TableBinding& table, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip, uintptr_t stream,
                 uintptr_t moving, uintptr_t moving_stream, py::object owners) {
        keep_for_graph(stream, std::move(owners));
        call(&Library::capture, *stepper_, table.view(), arguments_of(table, grad_scale, found_inf, clip),
             pointer(moving), stream_of(moving_stream), stream_of(stream));
    }

    // Has what a norm works in sent to memory of the plan's size, which `owner` keeps.
    void make_norm(const TableBinding& table, int device, uintptr_t memory, py::object owner, uintptr_t stream) {
        const NormPlan plan(table.view());
        norm_ = call(&Library::upload, plan, plan.sent().data(), table.grad_dtype(), device, pointer(memory),
                     stream_of(stream));
        norm_owner_ = std::move(owner);
    }

    // places and sums: addresses of an int64 for each row, and of an fp64 for each parameter of the optimizer.
    void sum_squares(const TableBinding& table, uintptr_t places, uintptr_t sums, uintptr_t stream) {
        Dropped::release();
        const SquaresLaunch launch = norm_of(places, sums);
        const Table view = table.view();
        const py::gil_scoped_release released;
        call(&Library::sum_squares, *stepper_, view, launch, table.grad_dtype(), stream_of(stream));
    }

    void capture_squares(const TableBinding& table, uintptr_t places, uintptr_t sums, uintptr_t stream,
                         uintptr_t moving, uintptr_t moving_stream, py::object owners) {
        const SquaresLaunch launch = norm_of(places, sums);
        keep_for_graph(stream, std::move(owners));
        call(&Library::capture_squares, *stepper_, table.view(), launch, table.grad_dtype(), pointer(moving),
             stream_of(moving_stream), stream_of(stream));
    }

   private:
    SquaresLaunch norm_of(uintptr_t places, uintptr_t sums) const {
        if (!norm_owner_) throw std::logic_error("a norm was asked for before it was planned");
        SquaresLaunch launch = norm_;
        launch.places = pointer<const int64_t>(places);
        launch.sums = pointer<double>(sums);
        return launch;
    }

    py::object norm_owner_;
    SquaresLaunch norm_{};
    // Outlives the stepper, which waits for copies out of it.
    py::object owners_;
    OwnedStepper stepper_;
};

}  // namespace
}  // namespace lookahead_fused

PYBIND11_MODULE(LOOKAHEAD_FUSED_CUDA_MODULE, module) {
    using namespace lookahead_fused;
    bind_table(module);
    bind_watch(module);
    module.attr("ring") = RING;
    module.attr("architectures") = LOOKAHEAD_FUSED_CUDA_ARCHITECTURES;
    // Of CUDA, as 1000 * major + 10 * minor.
    module.attr("runtime_version") = CUDART_VERSION;
    module.def("device_count", [] { return call(&Library::device_count); });
    module.def("load_kernels", [](int device) { call(&Library::load_kernels, device); });
    module.def(
        "make_clip",
        [](uintptr_t sums, int64_t count, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip, uintptr_t skip,
           uintptr_t skipped, int device, uintptr_t stream) {
            call(&Library::make_clip, clip_arguments(sums, count, grad_scale, found_inf, clip, skip, skipped), device,
                 stream_of(stream));
        },
        py::arg("sums"), py::arg("count"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("clip"),
        py::arg("skip"), py::arg("skipped"), py::arg("device"), py::arg("stream"));
    module.def("retain_for_graph", &keep_for_graph, py::arg("stream"), py::arg("owners"));
    // Calls a function that may wait for the device, or allocate memory, while some stream is being captured.
    module.def("allowed_to_wait", [](const py::function& function) {
        const OwnedMayWait allowed(call(&Library::make_may_wait));
        return function();
    });
    py::class_<StepperBinding>(module, "Stepper", py::module_local())
        .def(py::init<const TableBinding&, int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, py::object>(),
             py::arg("table"), py::arg("device"), py::arg("fixed"), py::arg("moving"), py::arg("pinned"),
             py::arg("stream"), py::arg("owners"))
        .def_static("sizes", &StepperBinding::sizes, py::arg("table"))
        .def("step", &StepperBinding::step, py::arg("table"), py::arg("grad_scale"), py::arg("found_inf"),
             py::arg("clip"), py::arg("stream"))
        .def("make_norm", &StepperBinding::make_norm, py::arg("table"), py::arg("device"), py::arg("memory"),
             py::arg("owner"), py::arg("stream"))
        .def("sum_squares", &StepperBinding::sum_squares, py::arg("table"), py::arg("places"), py::arg("sums"),
             py::arg("stream"))
        .def("capture_squares", &StepperBinding::capture_squares, py::arg("table"), py::arg("places"), py::arg("sums"),
             py::arg("stream"), py::arg("moving"), py::arg("moving_stream"), py::arg("owners"))
        .def("update_fixed", &StepperBinding::update_fixed, py::arg("table"), py::arg("stream"))
        .def("capture", &StepperBinding::capture, py::arg("table"), py::arg("grad_scale"), py::arg("found_inf"),
             py::arg("clip"), py::arg("stream"), py::arg("moving"), py::arg("moving_stream"), py::arg("owners"));
}
