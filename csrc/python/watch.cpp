#include "watch.h"

#include <algorithm>

namespace lookahead_fused {
namespace {

// The parameters of a group, a list or tuple; null where the group is of a kind that is not watched.
PyObject* params_of(PyObject* group) {
    static PyObject* const key = PyUnicode_InternFromString("params");
    PyObject* params = PyDict_Check(group) ? PyDict_GetItem(group, key) : nullptr;
    return params != nullptr && (PyList_Check(params) || PyTuple_Check(params)) ? params : nullptr;
}

}  // namespace

Watch::Watch(py::handle tensor_type, py::list groups, py::list dormant) : reader_(tensor_type) {
    for (const py::handle group : groups) {
        PyObject* const params = params_of(group.ptr());
        if (params == nullptr) throw py::type_error("a parameter group must be a dict with a list or tuple of params");
        PyObject** const items = PySequence_Fast_ITEMS(params);
        groups_.push_back({group.ptr(), {items, items + PySequence_Fast_GET_SIZE(params)}});
    }
    for (const py::handle param : dormant) dormant_.push_back(param.ptr());
}

Watch::Seen Watch::look(py::list groups) const {
    if (groups.size() != groups_.size()) return Seen::STALE;
    for (size_t i = 0; i < groups_.size(); ++i) {
        const std::vector<PyObject*>& seen = groups_[i].params;
        PyObject* const group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(i));
        PyObject* const params = group == groups_[i].group ? params_of(group) : nullptr;
        if (params == nullptr || PySequence_Fast_GET_SIZE(params) != static_cast<Py_ssize_t>(seen.size()) ||
            !std::equal(seen.begin(), seen.end(), PySequence_Fast_ITEMS(params))) {
            return Seen::STALE;
        }
    }
    for (PyObject* const param : dormant_) {
        const bool own = reader_.has_own_gradient(Py_TYPE(param));
        const auto gradient =
            py::reinterpret_steal<py::object>(own ? PyObject_GetAttrString(param, "grad") : reader_.gradient(param));
        if (!gradient) throw py::error_already_set();
        if (!gradient.is_none()) return Seen::WOKEN;
    }
    return Seen::CURRENT;
}

void bind_watch(py::module_& module) {
    py::class_<Watch> watch(module, "Watch", py::module_local());
    watch.def(py::init<py::handle, py::list, py::list>(), py::arg("tensor_type"), py::arg("groups"), py::arg("dormant"))
        .def(
            "look", [](const Watch& self, py::list groups) { return static_cast<int>(self.look(groups)); },
            py::arg("groups"));
    watch.attr("CURRENT") = static_cast<int>(Watch::Seen::CURRENT);
    watch.attr("WOKEN") = static_cast<int>(Watch::Seen::WOKEN);
    watch.attr("STALE") = static_cast<int>(Watch::Seen::STALE);
}

}  // namespace lookahead_fused
