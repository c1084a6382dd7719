// An attribute that a class keeps in a slot (`__slots__`), read where it lies: what Python's look-up would find, at a
// twentieth of its price.
#pragma once

#include <pybind11/pybind11.h>
#include <structmember.h>

namespace lookahead_fused {

namespace py = pybind11;

class Slot {
   public:
    explicit Slot(const char* name) : name_(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name))) {}

    // Borrowed from the object; null, with no Python error set, where it has none. `missing` for an object whose class
    // has no such slot.
    PyObject* read(PyObject* object, PyObject* missing = nullptr) const {
        if (type_.ptr() != reinterpret_cast<PyObject*>(Py_TYPE(object))) look_up(Py_TYPE(object));
        if (offset_ == 0) return missing;
        return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
    }

   private:
    // A slot's descriptor comes before what instances have of the same name, so that where a class looks attributes up
    // as `object` does nothing else can be found.
    void look_up(PyTypeObject* type) const {
        type_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
        offset_ = 0;
        const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(type_.ptr(), name_.ptr()));
        if (!found) PyErr_Clear();
        if (!found || !Py_IS_TYPE(found.ptr(), &PyMemberDescr_Type)) return;
        if (type->tp_getattro != PyObject_GenericGetAttr) return;
        const auto* descriptor = reinterpret_cast<PyMemberDescrObject*>(found.ptr());
        if (descriptor->d_member->type == T_OBJECT_EX && PyType_IsSubtype(type, descriptor->d_common.d_type)) {
            offset_ = descriptor->d_member->offset;
        }
    }

    py::object name_;
    // The class that was last asked about, and where its instances have the slot; 0 where they have none.
    mutable py::object type_;
    mutable Py_ssize_t offset_ = 0;
};

}  // namespace lookahead_fused
