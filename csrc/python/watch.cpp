#include "watch.h"

#include "collected.h"

namespace lookahead_fused {
namespace {

PyObject* params_of(PyObject* group) {
    static PyObject* const key = PyUnicode_InternFromString("params");
    PyObject* params = PyDict_Check(group) ? PyDict_GetItem(group, key) : nullptr;
    return params != nullptr && PyList_Check(params) ? params : nullptr;
}

bool among(PyObject* key, const py::tuple& names) {
    for (const py::handle name : names) {
        if (PyUnicode_Check(key) && PyUnicode_Compare(key, name.ptr()) == 0) return true;
    }
    return false;
}

}  // namespace

Watch::Watch(py::handle tensor_type, py::list groups, py::dict state, py::tuple names, py::list dormant)
    : reader_(tensor_type) {
    py::list kept;
    for (const py::handle group : groups) {
        PyObject* params = params_of(group.ptr());
        if (params == nullptr) throw py::type_error("a parameter group's params must be a list");
        GroupSeen seen{group.ptr(), {}};
        kept.append(group);
        for (const py::handle param : py::reinterpret_borrow<py::list>(params)) {
            seen.params.push_back(param.ptr());
            kept.append(param);
        }
        groups_.push_back(std::move(seen));
    }
    for (const auto& [param, own] : state) {
        kept.append(param);
        // An optimizer may keep something for itself under a name of its own.
        if (!PyDict_Check(own.ptr())) {
            state_.push_back({param.ptr(), NOT_A_DICT});
            continue;
        }
        const py::dict entries = py::reinterpret_borrow<py::dict>(own);
        state_.push_back({param.ptr(), entries.size()});
        for (const auto& [key, value] : entries) {
            kept.append(key);
            entries_.push_back({key.ptr(), among(key.ptr(), names) ? value.ptr() : nullptr});
        }
    }
    for (const py::handle param : dormant) {
        kept.append(param);
        dormant_.push_back(param.ptr());
    }
    held_ = py::tuple(kept);
}

bool Watch::current(py::list groups, py::dict state, bool deep) const {
    if (groups.size() != groups_.size() || state.size() != state_.size()) return false;
    for (size_t i = 0; i < groups_.size(); ++i) {
        const GroupSeen& seen = groups_[i];
        PyObject* group = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(i));
        PyObject* params = group == seen.group ? params_of(group) : nullptr;
        if (params == nullptr || PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(seen.params.size())) return false;
        for (size_t j = 0; j < seen.params.size(); ++j) {
            if (PyList_GET_ITEM(params, static_cast<Py_ssize_t>(j)) != seen.params[j]) return false;
        }
    }
    if (deep && !same_entries(state)) return false;
    for (PyObject* sleeper : dormant_) {
        PyObject* gradient = reader_.gradient(sleeper);
        const bool woke = gradient != Py_None;
        Py_DECREF(gradient);
        if (woke) return false;
    }
    return true;
}

bool Watch::same_entries(py::dict state) const {
    PyObject *param, *own, *key, *value;
    Py_ssize_t position = 0;
    const Entry* entry = entries_.data();
    for (const StateSeen& seen : state_) {
        if (!PyDict_Next(state.ptr(), &position, &param, &own) || param != seen.param) return false;
        if (seen.entries == NOT_A_DICT) continue;
        if (!PyDict_Check(own) || PyDict_GET_SIZE(own) != static_cast<Py_ssize_t>(seen.entries)) return false;
        for (Py_ssize_t at = 0; PyDict_Next(own, &at, &key, &value); ++entry) {
            if (key != entry->key || (entry->value != nullptr && value != entry->value)) return false;
        }
    }
    return true;
}

bool Watch::state_is_private(py::dict state) const {
    for (const auto& [param, own] : state) {
        if (PyDict_Check(own.ptr()) && Py_REFCNT(own.ptr()) > 1) return false;
    }
    for (const Entry& entry : entries_) {
        // Once in the dict and once among a row's columns. What is not a plain tensor (a DTensor's state) has parts
        // that are counted elsewhere.
        if (entry.value != nullptr && (!reader_.is_plain_tensor(entry.value) || Py_REFCNT(entry.value) > 2))
            return false;
    }
    return true;
}

int Watch::traverse(visitproc visit, void* argument) const { return visit_all({held_.ptr()}, visit, argument); }

void Watch::clear() {
    groups_.clear();
    state_.clear();
    entries_.clear();
    dormant_.clear();
    held_ = py::tuple();
}

void bind_watch(py::module_& module) {
    py::class_<Watch>(module, "Watch", collected<Watch>(), py::module_local())
        .def(py::init<py::handle, py::list, py::dict, py::tuple, py::list>())
        .def("current", &Watch::current, py::arg("groups"), py::arg("state"), py::arg("deep"))
        .def("state_is_private", &Watch::state_is_private, py::arg("state"));
}

}  // namespace lookahead_fused
