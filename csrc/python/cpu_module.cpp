// lookahead_fused._cpu: the table, a step over it on the CPU, and what else is done to memory there.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../cpu/exchange.h"
#include "../cpu/huge_pages.h"
#include "../cpu/norm.h"
#include "../cpu/parallel.h"
#include "../cpu/step.h"
#include "../rules/all.h"
#include "addresses.h"
#include "table_binding.h"
#include "watch.h"

namespace lookahead_fused {
namespace {

// A table's kernels and the room they work in; lives as long as the table.
class Stepper {
   public:
    Stepper(const TableBinding& table, const std::string& instruction_set)
        : step_(kernel(table, instruction_set, table.rule(), table.grad_dtype())),
          sync_(kernel(table, instruction_set, External::name, table.param_dtype())),
          squares_(find_squares(instruction_set, table.grad_dtype())) {
        if (table.view().row_count > 0 && table.device_type() != dlpack::CPU) {
            throw py::value_error("the CPU backend was given a table of tensors on another device");
        }
    }

    // Where grad_scale is None the gradients are as they are, and where clip is None all of them. The interpreter's
    // lock is kept: whoever waits for it may be about to move memory whose address was just read (a queue's feeder
    // thread shares it, an offloader frees it).
    void run(const TableBinding& table, std::optional<float> grad_scale, std::optional<double> clip, int threads,
             bool own_threads) {
        const StepArguments arguments{grad_scale ? &*grad_scale : nullptr, nullptr, clip ? &*clip : nullptr,
                                      table.pass(), table.event_later()};
        const Kernel& kernel = table.pass() == Pass::SYNC ? sync_ : step_;
        workspace_.step(table.view(), kernel, arguments, threads, own_threads);
    }

    // places and sums: addresses of an int64 for each row, and of an fp64 for each parameter of the optimizer.
    void sum_squares(const TableBinding& table, uintptr_t places, uintptr_t sums, int threads, bool own_threads) {
        norm_.sum(table.view(), squares_, reinterpret_cast<const int64_t*>(places), reinterpret_cast<double*>(sums),
                  threads, own_threads);
    }

   private:
    static const Kernel& kernel(const TableBinding& table, const std::string& instruction_set, const std::string& rule,
                                Dtype grad) {
        const Kernel* const found = find_kernel(instruction_set, rule, table.param_dtype(), grad, table.state_dtype());
        if (found == nullptr) throw py::value_error("rule '" + rule + "' has no CPU walk for these dtypes");
        return *found;
    }

    const Kernel& step_;
    const Kernel& sync_;
    const SquaresOfBlock squares_;
    Workspace workspace_;
    NormWorkspace norm_;
};

// Pairs of tensors of one dtype and layout, in CPU memory. Nothing has changed where this throws.
void exchange_tensors(py::handle tensor_type, py::list pairs, int threads, bool own_threads) {
    // A reader each: what describes one of them may be the reader's own, up to its next description.
    TensorReader first(tensor_type), second(tensor_type);
    std::vector<Trade> trades;
    for (const py::handle entry : pairs) {
        const py::tuple pair = py::reinterpret_borrow<py::tuple>(entry);
        Description a, b;
        const bool described = first.is_plain(pair[0].ptr()) && second.is_plain(pair[1].ptr()) &&
                               first.describe(pair[0].ptr(), a) && second.describe(pair[1].ptr(), b);
        if (!described || a.device.type != dlpack::CPU || !a.same_device(b) || !(a.dtype == b.dtype) ||
            !a.same_layout(b) || ((a.data == nullptr || b.data == nullptr) && a.numel() > 0)) {
            throw py::value_error("two tensors that are to trade places must lie alike in CPU memory");
        }
        const auto bytes = static_cast<size_t>(a.numel()) * (a.dtype.bits / 8);
        trades.push_back({static_cast<std::byte*>(a.data), static_cast<std::byte*>(b.data), bytes});
    }
    exchange(trades, threads, own_threads);
}

}  // namespace
}  // namespace lookahead_fused

PYBIND11_MODULE(_cpu, module) {
    using namespace lookahead_fused;
    bind_table(module);
    bind_watch(module);
    module.def("instruction_sets", &instruction_sets);
    module.def("torch_threads_serve", &torch_threads_serve);
    module.def(
        "prefer_huge_pages",
        [](uintptr_t address, size_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(address), bytes); },
        py::arg("address"), py::arg("bytes"));
    module.def(
        "make_clip",
        [](uintptr_t sums, int64_t count, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t clip, uintptr_t skip,
           uintptr_t skipped) { make_clip(clip_arguments(sums, count, grad_scale, found_inf, clip, skip, skipped)); },
        py::arg("sums"), py::arg("count"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("clip"),
        py::arg("skip"), py::arg("skipped"));
    module.def("exchange", &exchange_tensors, py::arg("tensor_type"), py::arg("pairs"), py::arg("threads"),
               py::arg("own_threads"));
    py::class_<Stepper>(module, "Stepper", py::module_local())
        .def(py::init<const TableBinding&, const std::string&>(), py::arg("table"), py::arg("instruction_set"))
        .def("run", &Stepper::run, py::arg("table"), py::arg("grad_scale"), py::arg("clip"), py::arg("threads"),
             py::arg("own_threads"))
        .def("sum_squares", &Stepper::sum_squares, py::arg("table"), py::arg("places"), py::arg("sums"),
             py::arg("threads"), py::arg("own_threads"));
}
