// Lets Python's garbage collector see through a C++ object to the Python objects it keeps. Without it, a cycle such as
// parameter -> hook -> optimizer -> table -> parameter would never be freed.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

namespace lookahead_fused {

namespace py = pybind11;

inline int visit_all(std::initializer_list<PyObject*> objects, visitproc visit, void* argument) {
    for (PyObject* object : objects) {
        const int result = object == nullptr ? 0 : visit(object, argument);
        if (result != 0) return result;
    }
    return 0;
}

// For a class with members traverse(visit, argument) and clear().
template <class T>
py::custom_type_setup collected() {
    return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
        PyTypeObject* type = &heap_type->ht_type;
        type->tp_flags |= Py_TPFLAGS_HAVE_GC;
        type->tp_traverse = [](PyObject* self, visitproc visit, void* argument) {
            const int result = visit(reinterpret_cast<PyObject*>(Py_TYPE(self)), argument);
            if (result != 0) return result;
            if (!py::detail::is_holder_constructed(self)) return 0;
            return py::cast<T&>(py::handle(self)).traverse(visit, argument);
        };
        type->tp_clear = [](PyObject* self) {
            if (py::detail::is_holder_constructed(self)) py::cast<T&>(py::handle(self)).clear();
            return 0;
        };
    });
}

}  // namespace lookahead_fused
