// The table as Python sees it: the class, its place among the names of a module, and for kernels that are not compiled
// from csrc where things stand in it.
#include <pybind11/stl.h>

#include <cctype>
#include <cstddef>

#include "../rules/all.h"
#include "../slow/all.h"
#include "../state/int8.h"
#include "../table/norm_plan.h"
#include "../table/packed.h"
#include "addresses.h"
#include "collected.h"
#include "table_binding.h"

namespace lookahead_fused {
namespace {

std::string upper(std::string text) {
    for (char& letter : text) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
    return text;
}

// For a kernel that cannot read the headers: where things stand in the table, in bytes, and the kinds of pullback.
py::dict layout() {
    py::dict at;
    at["ROW"] = sizeof(Row);
    for (int i = 0; i < COLUMNS; ++i) {
        const char* const name = i == MOMENT ? "moment" : i == MOMENT_SCALE ? "moment_scale" : COLUMN_FACTS[i].name;
        if (name != nullptr) at[py::str("ROW_" + upper(name))] = offsetof(Row, column) + i * sizeof(void*);
    }
    at["CODE_BLOCK"] = CODE_BLOCK;
    at["ROW_GROUP"] = offsetof(Row, group);
    at["ROW_MOMENTS_LOADED"] = offsetof(Row, moments_loaded);
    at["GROUP"] = sizeof(Group);
    at["GROUP_RULE"] = offsetof(Group, rule);
    at["GROUP_POLICY"] = offsetof(Group, policy);
    at["GROUP_LIVE"] = offsetof(Group, live);
    at["LIVES"] = MAX_LIVE;
    at["LIVE"] = sizeof(Live);
    at["LIVE_SLOT"] = offsetof(Live, slot);
    at["LIVE_IS_DOUBLE"] = offsetof(Live, is_double);
    at["POLICY_SLOT"] = static_cast<int>(Field::POLICY);
    at["CHUNK"] = sizeof(Chunk);
    at["CHUNK_OFFSET"] = offsetof(Chunk, offset);
    at["CHUNK_ROW"] = offsetof(Chunk, row);
    at["NORM_LANES"] = NORM_LANES;
    at["CHUNK_COUNT"] = offsetof(Chunk, count);
    at["PULLBACK_KEEP"] = static_cast<int>(Pullback::KEEP);
    at["PULLBACK_INTERPOLATE"] = static_cast<int>(Pullback::INTERPOLATE);
    at["CLASSICAL"] = static_cast<int>(Kind::CLASSICAL);
    at["NESTEROV"] = static_cast<int>(Kind::NESTEROV);
    at["EMA_UNIFORM"] = Ema::UNIFORM;
    at["PULLBACK_RESET"] = static_cast<int>(Pullback::RESET);
    return at;
}

// The columns of a row in their order: what each is called in a parameter's state (None: a moment, or a moment's scale,
// which its rule names), its type of elements, how many it has, whether every row has it.
py::tuple columns() {
    const char* const types[] = {"param", "grad", "master", "compute", "moment", "float64"};
    const char* const extents[] = {"one", "elements", "blocks"};
    py::list all;
    for (const ColumnFacts& facts : COLUMN_FACTS) {
        const py::object name = facts.name == nullptr ? py::object(py::none()) : py::object(py::str(facts.name));
        all.append(py::make_tuple(name, types[facts.type], extents[facts.extent], facts.required));
    }
    return py::tuple(all);
}

}  // namespace

void bind_table(py::module_& module) {
#if defined(LOOKAHEAD_FUSED_BUILD)
    // Of the library that it loads, which the package's record names too.
    module.attr("build") = LOOKAHEAD_FUSED_BUILD;
#endif
    module.def("rules", [] {
        py::dict rules;
        for (const Names& rule : rule_names()) {
            rules[py::str(rule.name)] = py::make_tuple(
                py::tuple(py::cast(rule.hypers)), py::tuple(py::cast(rule.moments)), py::tuple(py::cast(rule.squares)));
        }
        return rules;
    });
    module.def("policies", [] {
        py::dict policies;
        for (const Names& policy : policy_names()) {
            policies[py::str(policy.name)] = py::tuple(py::cast(policy.hypers));
        }
        return policies;
    });
    module.def("columns", &columns);
    module.attr("POLICY_SLOT") = static_cast<int>(Field::POLICY);
    py::dict kinds;
    kinds["NUMBER"] = static_cast<int>(Field::NUMBER);
    kinds["PRESENCE"] = static_cast<int>(Field::PRESENCE);
    kinds["SWITCH"] = static_cast<int>(Field::SWITCH);
    module.attr("FIELD_KINDS") = kinds;
    module.def("layout", &layout);
    py::class_<Packed>(module, "Packed", py::module_local())
        .def_readonly("chunks", &Packed::chunks)
        .def_readonly("fixed", &Packed::fixed)
        .def_readonly("gradients", &Packed::gradients)
        .def_readonly("moving", &Packed::moving);
    py::class_<NormPlan>(module, "NormPlan", py::module_local())
        .def_readonly("count", &NormPlan::count)
        .def_readonly("first_block", &NormPlan::first_block)
        .def_readonly("done", &NormPlan::done)
        .def_readonly("partial", &NormPlan::partial)
        .def_readonly("bytes", &NormPlan::bytes)
        .def_property_readonly("sent", [](const NormPlan& plan) { return plan.sent().size(); })
        .def(
            "pack",
            [](const NormPlan& plan, uintptr_t to) {
                if (!plan.sent().empty()) std::memcpy(pointer(to), plan.sent().data(), plan.sent().size());
            },
            py::arg("to"));
    py::enum_<TensorReader::Way>(module, "Way", py::module_local())
        .value("SHIM", TensorReader::Way::SHIM)
        .value("EXCHANGE_API", TensorReader::Way::EXCHANGE_API)
        .value("ATTRIBUTES", TensorReader::Way::ATTRIBUTES);
    // A number each and not a Python enum, which costs a short step more than all of its other arguments.
    py::dict passes;
    passes["STEP"] = static_cast<int>(Pass::STEP);
    passes["SYNC"] = static_cast<int>(Pass::SYNC);
    module.attr("PASSES") = passes;
    py::class_<TableBinding>(module, "Table", collected<TableBinding>(), py::module_local())
        .def(py::init<py::handle, TensorReader::Way, const std::string&, const std::string&, const std::string&,
                      const std::string&, const std::string&, py::tuple, py::tuple, py::object, py::object, py::object,
                      int64_t>(),
             py::arg("tensor_type"), py::arg("fastest"), py::arg("rule"), py::arg("policy"), py::arg("param_dtype"),
             py::arg("grad_dtype"), py::arg("state_dtype"), py::arg("entries"), py::arg("fields"), py::arg("conform"),
             py::arg("hold"), py::arg("read_group"), py::arg("chunk_elements"))
        .def("set_device", &TableBinding::set_device, py::arg("tensor"))
        .def("add_group", &TableBinding::add_group, py::arg("group"))
        .def("add_row", &TableBinding::add_row, py::arg("owner"), py::arg("copy"), py::arg("state"), py::arg("group"),
             py::arg("present"), py::arg("hosted"), py::arg("moments_loaded"), py::arg("acts_on_moment"),
             py::arg("version"))
        .def(
            "refresh",
            [](TableBinding& table, py::dict state, int pass, bool event_later) {
                return table.refresh(state, static_cast<Pass>(pass), event_later);
            },
            py::arg("state"), py::arg("pass_"), py::arg("event_later") = false)
        .def("release", &TableBinding::release)
        .def("updated", &TableBinding::updated)
        .def("pinned", &TableBinding::pinned)
        .def("tensors", &TableBinding::tensors)
        .def_property_readonly("moves", &TableBinding::moves)
        .def_property_readonly("way", &TableBinding::way)
        .def_property_readonly("row_count", [](const TableBinding& table) { return table.view().row_count; })
        .def_property_readonly("chunk_count", [](const TableBinding& table) { return table.view().chunk_count; })
        .def("norm_plan", [](const TableBinding& table) { return NormPlan(table.view()); })
        .def("packed", [](const TableBinding& table) { return Packed(table.view()); })
        .def(
            "pack_fixed", [](const TableBinding& table, uintptr_t to) { pack_fixed(table.view(), pointer(to)); },
            py::arg("to"))
        .def(
            "pack_moving",
            [](const TableBinding& table, uintptr_t to) {
                pack_moving(table.view(), table.pass(), table.reads_gradient(), pointer(to));
            },
            py::arg("to"));
}

}  // namespace lookahead_fused
