#include "group_reader.h"

#include <limits>

#include "collected.h"

namespace lookahead_fused {
namespace {

// A number that can be read where it lies, in the step: on a GPU the host never sees its value.
bool is_number(TensorReader& tensors, const Description& device, PyObject* value, Description& out) {
    return tensors.describe(value, out) && out.same_device(device) && out.numel() == 1 && out.data != nullptr &&
           (out.dtype == dlpack_dtype(Dtype::FLOAT32) || out.dtype == dlpack_dtype(Dtype::FLOAT64));
}

double number_at(const Group& group, int slot) {
    return slot >= Field::POLICY ? group.policy[slot - Field::POLICY] : group.rule[slot];
}

}  // namespace

GroupReader::GroupReader(py::tuple fields, py::object read_group)
    : fields_tuple_(std::move(fields)), read_group_(std::move(read_group)) {
    for (const py::handle entry : fields_tuple_) {
        // The names are interned, so that the dictionaries find them by identity.
        const auto tuple = py::reinterpret_borrow<py::tuple>(entry);
        const Field field{tuple[0].ptr(),          tuple[1].cast<Py_ssize_t>(),
                          tuple[2].cast<int>(),    static_cast<Field::Kind>(tuple[3].cast<int>()),
                          tuple[4].cast<double>(), tuple[5].cast<double>()};
        if (field.slot >= Field::POLICY + MAX_POLICY_HYPERS) throw py::index_error("a Group has no such slot");
        fields_.push_back(field);
    }
}

int32_t GroupReader::add(TensorReader& tensors, const Description& device, py::dict group) {
    Source source{group.ptr(), {}};
    source.values.resize(fields_.size());
    source.places.resize(fields_.size());
    sources_.push_back(std::move(source));
    groups_.emplace_back();
    read_in_python(tensors, device, sources_.size() - 1);
    return static_cast<int32_t>(sources_.size() - 1);
}

bool GroupReader::refresh(TensorReader& tensors, const Description& device) {
    for (size_t i = 0; i < sources_.size(); ++i) {
        if (!read(tensors, device, i)) return false;
    }
    return true;
}

// Borrowed; null where there is no such entry.
PyObject* GroupReader::look_up(Source& source, size_t field) const {
    PyObject *const wanted = fields_[field].key, *key = nullptr, *value = nullptr;
    PyObject* const entry = PyDict_GetItemWithError(source.dict, wanted);
    if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
    for (Py_ssize_t position = 0; entry != nullptr;) {
        source.places[field] = position;
        if (!PyDict_Next(source.dict, &position, &key, &value) || same_name(key, wanted)) break;
    }
    return entry;
}

// The group's values, where they are the same objects as last time, are the same values.
bool GroupReader::read(TensorReader& tensors, const Description& device, size_t index) {
    Source& source = sources_[index];
    Group& group = groups_[index];
    bool ask_python = source.each_step;
    PyObject* entry = nullptr;
    for (size_t i = 0; i < fields_.size(); ++i) {
        const Field& field = fields_[i];
        // The items of a pair stand side by side.
        if (i == 0 || field.key != fields_[i - 1].key) {
            // A dictionary keeps its order: mostly an entry is where it was, a quarter of the work of looking it up.
            PyObject* key = nullptr;
            Py_ssize_t position = source.places[i];
            if (!PyDict_Next(source.dict, &position, &key, &entry) || !same_name(key, field.key))
                entry = look_up(source, i);
        }
        PyObject* value = entry;
        if (value != nullptr && field.item >= 0) {
            if (!PyTuple_CheckExact(value) || PyTuple_GET_SIZE(value) != 2) {
                ask_python = true;
                continue;
            }
            value = PyTuple_GET_ITEM(value, field.item);
        }
        // An entry may be missing where Python has a default for it.
        if (value == source.values[i].ptr()) continue;
        if (value == nullptr || field.kind == Field::SWITCH) return false;
        double number = std::numeric_limits<double>::quiet_NaN();
        if (PyFloat_CheckExact(value)) number = PyFloat_AS_DOUBLE(value);
        if (is_live(source, source.values[i].ptr())) return false;
        if (!(number >= field.low && number <= field.high)) {
            ask_python = true;
            continue;
        }
        if (field.kind == Field::PRESENCE && (number_at(group, field.slot) != 0) != (number != 0)) return false;
        assign(group, field.slot, number);
        source.values[i] = py::reinterpret_borrow<py::object>(value);
    }
    if (ask_python) {
        const Group before = group;
        read_in_python(tensors, device, index);
        for (const Field& field : fields_) {
            if (field.kind == Field::PRESENCE &&
                (number_at(before, field.slot) != 0) != (number_at(group, field.slot) != 0)) {
                return false;
            }
        }
    }
    for (int i = 0; i < MAX_LIVE && source.live[i] != nullptr; ++i) {
        Description described;
        if (!is_number(tensors, device, source.live[i], described) || described.data != group.live[i].at ||
            group.live[i].is_double != (described.dtype == dlpack_dtype(Dtype::FLOAT64))) {
            return false;
        }
    }
    return true;
}

bool GroupReader::is_live(const Source& source, PyObject* tensor) {
    for (PyObject* const live : source.live) {
        if (live != nullptr && live == tensor) return true;
    }
    return false;
}

// Validates the group, or raises; sees every kind of value that a group may hold.
void GroupReader::read_in_python(TensorReader& tensors, const Description& device, size_t index) {
    Source& source = sources_[index];
    Group& group = groups_[index];
    const py::object read =
        py::reinterpret_steal<py::object>(PyObject_CallFunctionObjArgs(read_group_.ptr(), source.dict, nullptr));
    if (!read) throw py::error_already_set();
    const py::tuple values = read;
    if (values.size() != fields_.size()) throw py::value_error("a group has a number for each field");
    source.each_step = false;
    int lives = 0;
    for (int i = 0; i < MAX_LIVE; ++i) {
        source.live[i] = nullptr;
        group.live[i] = {};
    }
    for (size_t i = 0; i < fields_.size(); ++i) {
        const Field& field = fields_[i];
        py::object value = py::reinterpret_borrow<py::object>(PyDict_GetItem(source.dict, field.key));
        if (value && field.item >= 0) value = value[py::int_(field.item)];
        source.values[i] = value;
        assign(group, field.slot, py::object(values[i]).cast<double>());
        if (field.slot >= 0 && value && tensors.is_tensor(value.ptr())) {
            Description described;
            if (lives < MAX_LIVE && is_number(tensors, device, value.ptr(), described)) {
                group.live[lives] = {described.data, field.slot, described.dtype == dlpack_dtype(Dtype::FLOAT64)};
                source.live[lives++] = value.ptr();
            } else {
                source.each_step = true;
            }
        }
    }
}

void GroupReader::assign(Group& group, int slot, double value) {
    if (slot >= Field::POLICY) {
        group.policy[slot - Field::POLICY] = value;
    } else if (slot >= 0) {
        group.rule[slot] = value;
    }
}

int GroupReader::traverse(visitproc visit, void* argument) const {
    return visit_all({fields_tuple_.ptr(), read_group_.ptr()}, visit, argument);
}

void GroupReader::clear() {
    sources_.clear();
    groups_.clear();
    fields_.clear();
    fields_tuple_ = py::tuple();
    read_group_ = py::object();
}

}  // namespace lookahead_fused
