#include "torch_shim.h"

#include <pybind11/pybind11.h>

#include <cstring>

#include "../torch/symbol.h"

namespace py = pybind11;

namespace lookahead_fused {
namespace {

// An at::Tensor is a pointer to its implementation: where in the Python object one to this tensor's stands; 0 for none.
size_t offset_of_tensor(PyObject* tensor) {
    void* implementation = nullptr;
    PyTypeObject* type = nullptr;
    try {
        const py::module_ torch = py::module_::import("torch._C");
        const py::object capsule = torch.attr("_tensor_impl_raw_handle")(py::handle(tensor));
        implementation = PyCapsule_GetPointer(capsule.ptr(), nullptr);
        if (implementation == nullptr) throw py::error_already_set();
        // What all classes of tensors begin with.
        type = reinterpret_cast<PyTypeObject*>(torch.attr("TensorBase").ptr());
    } catch (const py::error_already_set&) {
        return 0;
    }
    size_t found = 0;
    for (size_t at = sizeof(PyObject); at + sizeof(void*) <= static_cast<size_t>(type->tp_basicsize);
         at += sizeof(void*)) {
        void* word;
        std::memcpy(&word, reinterpret_cast<char*>(tensor) + at, sizeof(word));
        if (word != implementation) continue;
        if (found != 0) return 0;
        found = at;
    }
    return found;
}

}  // namespace

const TorchShim* TorchShim::find(PyObject* tensor) {
    static TorchShim shim;
    static const bool loaded = shim.load(tensor);
    return loaded ? &shim : nullptr;
}

bool TorchShim::load(PyObject* tensor) {
    offset_ = offset_of_tensor(tensor);
    return offset_ != 0 && find_in_torch(layout_, "aoti_torch_get_layout") &&
           find_in_torch(dtype_, "aoti_torch_get_dtype") && find_in_torch(device_type_, "aoti_torch_get_device_type") &&
           find_in_torch(device_index_, "aoti_torch_get_device_index") &&
           find_in_torch(data_, "aoti_torch_get_data_ptr") && find_in_torch(ndim_, "aoti_torch_get_dim") &&
           find_in_torch(shape_, "aoti_torch_get_sizes") && find_in_torch(strides_, "aoti_torch_get_strides");
}

}  // namespace lookahead_fused
