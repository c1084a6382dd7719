// lookahead_fused._cpu: the table, and a step over it on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "../cpu/huge_pages.h"
#include "../cpu/parallel.h"
#include "../cpu/step.h"
#include "table_binding.h"
#include "watch.h"

namespace lookahead_fused {
namespace {

constexpr int DLPACK_CPU = 1;

// A table's kernel and the room it works in; lives as long as the table does not change.
class Stepper {
   public:
    Stepper(const TableBinding& table, const std::string& instruction_set)
        : kernel_(find_kernel(instruction_set, table.rule(), table.param_dtype(), table.grad_dtype())),
          workspace_(check(table), *kernel_) {}

    // Where grad_scale is None the gradients are as they are.
    void step(const TableBinding& table, std::optional<float> grad_scale, int threads, bool own_threads) {
        const StepArguments arguments{grad_scale ? &*grad_scale : nullptr, nullptr};
        const Table view = table.view();
        const py::gil_scoped_release released;
        workspace_.step(view, *kernel_, arguments, threads, own_threads);
    }

   private:
    Table check(const TableBinding& table) const {
        if (kernel_ == nullptr) throw py::value_error("rule '" + table.rule() + "' has no CPU walk for these dtypes");
        const Table view = table.view();
        if (view.row_count > 0 && table.device_type() != DLPACK_CPU) {
            throw py::value_error("the CPU backend was given a table of tensors on another device");
        }
        return view;
    }

    const Kernel* kernel_;
    Workspace workspace_;
};

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
    py::class_<Stepper>(module, "Stepper", py::module_local())
        .def(py::init<const TableBinding&, const std::string&>(), py::arg("table"), py::arg("instruction_set"))
        .def("step", &Stepper::step, py::arg("table"), py::arg("grad_scale"), py::arg("threads"),
             py::arg("own_threads"));
}
