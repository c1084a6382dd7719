// The table as Python sees it: the class, its place among the names of a module, and for kernels that are not compiled
// from csrc where things stand in it.
#include <pybind11/stl.h>

#include <cstddef>

#include "../rules/sync.h"
#include "../table/packed.h"
#include "collected.h"
#include "table_binding.h"

namespace lookahead_fused {
namespace {

// For a kernel that cannot read the headers: where things stand in the table, in bytes, and the kinds of pullback.
py::dict layout() {
    const auto column = [](int index) { return offsetof(Row, column) + index * sizeof(void*); };
    py::dict at;
    at["ROW"] = sizeof(Row);
    at["ROW_PARAM"] = column(PARAM);
    at["ROW_MASTER"] = column(MASTER);
    at["ROW_SLOW"] = column(SLOW);
    at["ROW_STEP"] = column(STEP);
    at["ROW_SLOW_MOMENT"] = column(SLOW_MOMENT);
    at["ROW_MOMENT"] = column(MOMENT);
    at["ROW_GROUP"] = offsetof(Row, group);
    at["ROW_MOMENTS_LOADED"] = offsetof(Row, moments_loaded);
    at["GROUP"] = sizeof(Group);
    at["GROUP_HYPER"] = offsetof(Group, hyper);
    at["GROUP_ALPHA"] = offsetof(Group, alpha);
    at["GROUP_K"] = offsetof(Group, k);
    at["GROUP_PULLBACK"] = offsetof(Group, pullback);
    at["GROUP_LR_IS_DOUBLE"] = offsetof(Group, lr_is_double);
    at["GROUP_LR"] = offsetof(Group, lr);
    at["CHUNK"] = sizeof(Chunk);
    at["CHUNK_OFFSET"] = offsetof(Chunk, offset);
    at["CHUNK_ROW"] = offsetof(Chunk, row);
    at["CHUNK_COUNT"] = offsetof(Chunk, count);
    at["PULLBACK_INTERPOLATE"] = static_cast<int>(PULLBACK_INTERPOLATE);
    at["PULLBACK_RESET"] = static_cast<int>(PULLBACK_RESET);
    return at;
}

std::byte* bytes_at(uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

}  // namespace

void bind_table(py::module_& module) {
    module.def("rules", [] {
        py::dict rules;
        for (const auto& rule : rule_names()) {
            rules[py::str(rule.name)] =
                py::make_tuple(py::tuple(py::cast(rule.hypers)), py::tuple(py::cast(rule.moments)));
        }
        return rules;
    });
    module.def("layout", &layout);
    py::class_<Packed>(module, "Packed", py::module_local())
        .def_readonly("chunks", &Packed::chunks)
        .def_readonly("fixed", &Packed::fixed)
        .def_readonly("gradients", &Packed::gradients)
        .def_readonly("moving", &Packed::moving);
    py::enum_<TensorReader::Way>(module, "Way", py::module_local())
        .value("SHIM", TensorReader::Way::SHIM)
        .value("EXCHANGE_API", TensorReader::Way::EXCHANGE_API)
        .value("ATTRIBUTES", TensorReader::Way::ATTRIBUTES);
    py::class_<TableBinding>(module, "Table", collected<TableBinding>(), py::module_local())
        .def(py::init<py::handle, TensorReader::Way, const std::string&, const std::string&, const std::string&,
                      py::list, py::list, py::tuple, py::object, py::object, int64_t>(),
             py::arg("tensor_type"), py::arg("fastest"), py::arg("rule"), py::arg("param_dtype"), py::arg("grad_dtype"),
             py::arg("rows"), py::arg("groups"), py::arg("fields"), py::arg("conform"), py::arg("read_group"),
             py::arg("chunk_elements"))
        .def("refresh", &TableBinding::refresh, py::arg("read_gradients"), py::arg("deep"))
        .def("release", &TableBinding::release)
        .def("updated", &TableBinding::updated, py::arg("deep"))
        .def_property_readonly("way", &TableBinding::way)
        .def_property_readonly("row_count", [](const TableBinding& table) { return table.view().row_count; })
        .def_property_readonly("chunk_count", [](const TableBinding& table) { return table.view().chunk_count; })
        .def("packed", [](const TableBinding& table) { return Packed(table.view()); })
        .def(
            "pack_fixed", [](const TableBinding& table, uintptr_t to) { pack_fixed(table.view(), bytes_at(to)); },
            py::arg("to"))
        .def(
            "pack_moving",
            [](const TableBinding& table, uintptr_t to) {
                pack_moving(table.view(), table.reads_gradient(), bytes_at(to));
            },
            py::arg("to"));
}

}  // namespace lookahead_fused
