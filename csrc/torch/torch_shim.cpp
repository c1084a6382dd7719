#include "torch_shim.h"

#include <pybind11/pybind11.h>

#include <cstring>

#include "symbol.h"

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
    find_in_torch(layout_, "aoti_torch_get_layout");
    const bool found = offset_ != 0 && find_in_torch(dtype_, "aoti_torch_get_dtype") &&
                       find_in_torch(device_type_, "aoti_torch_get_device_type") &&
                       find_in_torch(device_index_, "aoti_torch_get_device_index") &&
                       find_in_torch(data_, "aoti_torch_get_data_ptr") && find_in_torch(ndim_, "aoti_torch_get_dim") &&
                       find_in_torch(shape_, "aoti_torch_get_sizes") &&
                       find_in_torch(strides_, "aoti_torch_get_strides") &&
                       find_in_torch(storage_size_, "aoti_torch_get_storage_size") &&
                       find_in_torch(storage_offset_, "aoti_torch_get_storage_offset");
    if (found) find_insides();
    return found;
}

bool TorchShim::marks(PyObject* tensor, Marks& out) const {
    out.known = keys_at_ != 0;
    if (!out.known) return false;
    out.dtype_and_device = word<uint32_t>(tensor, kind_at_);
    out.keys = word<uint64_t>(tensor, keys_at_);
    return true;
}

// An at::TensorImpl of torch 2.6 to 2.14 has, one after the other: the number of dimensions, room for five sizes and
// five strides, the offset into the storage, the number of elements, a word that begins with the dtype (16 bits) and
// the device (8 bits of type, 8 of index), the dispatch keys.
bool TorchShim::find_insides() {
    const py::module_ torch = py::module_::import("torch");
    const auto make = [&](const char* dtype, const char* device) {
        return torch.attr("zeros")(py::make_tuple(3, 4), py::arg("dtype") = torch.attr(dtype),
                                   py::arg("device") = device);
    };
    const py::object plain = make("float32", "cpu"), twin = make("float32", "cpu"), integer = make("int32", "cpu"),
                     meta = make("float32", "meta"), whole = make("float32", "cpu"),
                     negated = torch.attr("_neg_view")(make("float32", "cpu")), view = whole[py::slice(1, 3, 1)];
    Place place;
    if (!this->place(plain.ptr(), place) || place.ndim != 2) return false;
    const auto* const begin = static_cast<const char*>(implementation(plain.ptr()));
    const auto offset_of = [begin](const int64_t* inside) {
        return static_cast<size_t>(reinterpret_cast<const char*>(inside) - begin);
    };
    const size_t sizes = offset_of(place.shape), strides = offset_of(place.strides);
    if (sizes < 64 || sizes > 128 || strides != sizes + MOST_DIMENSIONS * sizeof(int64_t)) return false;
    const size_t ndim = sizes - 8, offset = strides + MOST_DIMENSIONS * 8, numel = offset + 8, kind = numel + 8,
                 keys = kind + 8;
    const auto kind_of = [&](const py::object& tensor) { return word<uint32_t>(tensor.ptr(), kind); };
    const auto keys_of = [&](const py::object& tensor) { return word<uint64_t>(tensor.ptr(), keys); };
    const bool as_expected =
        word<int64_t>(plain.ptr(), ndim) == 2 && word<int64_t>(plain.ptr(), numel) == 12 &&
        word<int64_t>(view.ptr(), numel) == 8 && word<int64_t>(plain.ptr(), offset) == 0 &&
        word<int64_t>(view.ptr(), offset) == 4 && kind_of(plain) == kind_of(twin) && kind_of(view) == kind_of(plain) &&
        keys_of(plain) == keys_of(twin) && keys_of(view) == keys_of(plain) && keys_of(plain) != 0 &&
        (kind_of(plain) ^ kind_of(integer)) != 0 && (kind_of(plain) ^ kind_of(integer)) <= 0xffff &&
        ((kind_of(plain) ^ kind_of(meta)) & 0xffff) == 0 && ((kind_of(plain) ^ kind_of(meta)) & 0xff0000) != 0 &&
        keys_of(negated) != keys_of(plain) && keys_of(meta) != keys_of(plain) && kind_of(negated) == kind_of(plain);
    if (as_expected) {
        ndim_at_ = ndim, sizes_at_ = sizes, strides_at_ = strides, kind_at_ = kind, keys_at_ = keys;
    }
    return as_expected;
}

}  // namespace lookahead_fused
