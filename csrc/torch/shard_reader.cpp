#include "shard_reader.h"

namespace lookahead_fused {
namespace {

py::object attribute(PyObject* object, PyObject* name) {
    auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
    if (!value) PyErr_Clear();
    return value;
}

}  // namespace

PyObject* ShardReader::part(PyObject* tensor) const {
    PyObject* shard = local_.read(tensor, Py_None);
    if (shard == Py_None) {
        static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
        const py::object found = attribute(tensor, name);
        // Somebody else has to hold it: it is handed out borrowed.
        shard = found && Py_REFCNT(found.ptr()) > 1 ? found.ptr() : nullptr;
    }
    return shard != nullptr && tensors_.is_plain(shard) ? shard : nullptr;
}

bool ShardReader::placed_alike(PyObject* own, PyObject* other, Alike& seen) const {
    if (Py_TYPE(own) != Py_TYPE(other)) return false;
    PyObject* const a = spec_.read(own);
    PyObject* const b = spec_.read(other);
    if (a == nullptr || b == nullptr || Py_TYPE(a) != Py_TYPE(b)) return false;
    // A spec can be changed, and both are then: FSDP2 gives a gradient its parameter's own.
    if (a == b) return true;
    static PyObject* const mesh = PyUnicode_InternFromString("mesh");
    static PyObject* const placements = PyUnicode_InternFromString("placements");
    const py::object mesh_a = attribute(a, mesh);
    if (!mesh_a || !mesh_a.is(attribute(b, mesh))) return false;
    py::object placed_a = attribute(a, placements), placed_b = attribute(b, placements);
    if (!placed_a || !placed_b || !PyTuple_CheckExact(placed_a.ptr()) || !PyTuple_CheckExact(placed_b.ptr())) {
        return false;
    }
    if (placed_a.is(placed_b) || (placed_a.is(seen.own) && placed_b.is(seen.other))) return true;
    const int equal = PyObject_RichCompareBool(placed_a.ptr(), placed_b.ptr(), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    if (equal == 1) seen = {std::move(placed_a), std::move(placed_b)};
    return equal == 1;
}

}  // namespace lookahead_fused
