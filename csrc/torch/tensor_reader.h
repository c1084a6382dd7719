// Reads a torch tensor from Python without any header of torch: where it lies, what it holds, and a parameter's
// gradient. This is per tensor and per step, so it is counted in tens of nanoseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../table/table.h"
#include "dlpack_abi.h"
#include "torch_shim.h"

namespace lookahead_fused {

namespace py = pybind11;

struct Description {
    void* data = nullptr;
    dlpack::Device device{};
    dlpack::DataType dtype{};
    int32_t ndim = 0;
    const int64_t* shape = nullptr;
    const int64_t* strides = nullptr;

    int64_t numel() const;
    bool has_odd_stride() const;
    bool same_device(const Description& other) const;
    // Pinned memory has numbers of its own in DLPack, which torch does not use so far.
    bool on_host() const;
    // The same shape, and strides that differ at most where a size of 1 makes them meaningless.
    bool same_layout(const Description& other) const;
};

// By torch's name for it. Throws where no column is of it.
Dtype dtype_named(const std::string& name);
dlpack::DataType dlpack_dtype(Dtype dtype);
inline bool operator==(dlpack::DataType a, dlpack::DataType b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// Not copied, and alive as long as the table it reads for.
class TensorReader {
   public:
    // The ways in which a tensor is described, the fastest first. Torch has the shim since 2.2 and DLPack's exchange
    // API since 2.10; without either, the same facts are asked of a tensor's Python attributes, at some microseconds
    // each.
    enum class Way { SHIM, EXCHANGE_API, ATTRIBUTES };

    // tensor_type is torch.Tensor; a way that is faster than `fastest` is left out.
    explicit TensorReader(py::handle tensor_type, Way fastest = Way::SHIM);

    // The fastest way that has described a tensor here.
    Way way() const;

    // False, with no Python error set, for a tensor that has no address: a sparse one, say. No other object is asked.
    // Shape and strides lie in the tensor or, where its attributes were asked, in this reader up to its next call.
    bool describe(PyObject* tensor, Description& out) {
        return describe_by_shim(tensor, out) || describe_first(tensor, out);
    }
    // As `describe`, for a tensor of this reader's fastest way whose like was described before: only whether it is like
    // that one, in a fraction of the time, and where it lies.
    bool is_like(PyObject* tensor, const TorchShim::Marks& marks, const Description& layout) const {
        return marks.known && (is_known(tensor) || is_tensor(tensor)) &&
               shim_->is_like(tensor, marks, layout.ndim, layout.shape, layout.strides);
    }
    void* data(PyObject* tensor) const { return shim_->data(tensor); }
    // Of a tensor that was described, or is like one.
    bool holds(PyObject* tensor, int64_t elements, int64_t element_bytes) const {
        return known_.empty() ? holds_by_attributes(tensor, elements, element_bytes)
                              : shim_->holds(tensor, elements, element_bytes);
    }
    // Of a tensor that was described; unknown where only descriptions are to be trusted.
    TorchShim::Marks marks(PyObject* tensor) const {
        TorchShim::Marks marks;
        if (fastest_ == Way::SHIM && !known_.empty()) shim_->marks(tensor, marks);
        return marks;
    }

    // A new reference; None where there is no gradient. Throws what the getter raised.
    PyObject* gradient(PyObject* tensor) const;
    // A class may give `grad` a meaning of its own; its tensors are then to be asked by attribute.
    bool has_own_gradient(PyTypeObject* type) const;
    // The lazy negation torch puts on a view such as x.conj().imag; the memory holds the opposite sign.
    bool is_negated(PyObject* tensor) const;
    // A tensor with memory of its own: not of a class around other tensors, whose operators do as the class says.
    bool is_plain(PyObject* object) const {
        return is_known(object) || (is_tensor(object) && !has_own_dispatch(Py_TYPE(object)));
    }
    bool is_tensor(PyObject* object) const { return PyObject_TypeCheck(object, tensor_type_); }

   private:
    // Tensors that the shim may describe: another way described one of these before, and the shim said the same. That
    // also tells what the numbers of the shim are called in DLPack.
    struct Known {
        PyTypeObject* type;
        TorchShim::Kind kind;
        dlpack::Device device;
        dlpack::DataType dtype;
    };

    // Of a class that was last found to be a tensor's with memory of its own: parameters, mostly.
    bool is_known(PyObject* object) const {
        return Py_TYPE(object) == tensor_type_ || reinterpret_cast<PyObject*>(Py_TYPE(object)) == plain_type_.ptr();
    }
    bool has_own_dispatch(PyTypeObject* type) const;
    bool describe_by_shim(PyObject* tensor, Description& out) const;
    bool describe_first(PyObject* tensor, Description& out);
    bool describe_by_attributes(PyObject* tensor, Description& out);
    bool holds_by_attributes(PyObject* tensor, int64_t elements, int64_t element_bytes) const;
    void learn(PyObject* tensor, const Description& described);

    PyTypeObject* tensor_type_;
    Way fastest_;
    const TorchShim* shim_ = nullptr;
    std::vector<Known> known_;
    const dlpack::ExchangeApi* api_ = nullptr;
    // What classes inherit that do not say otherwise.
    py::object gradient_descriptor_, dispatch_;
    // The classes of which it was last found that they do not, or do.
    mutable py::object plain_type_, usual_gradient_type_, around_type_;
    getter gradient_;
    void* gradient_closure_;
    PyCFunction is_negated_;
    // What describe_by_attributes last returned points here.
    std::vector<int64_t> shape_, strides_;
};

inline bool TensorReader::describe_by_shim(PyObject* tensor, Description& out) const {
    TorchShim::Kind kind;
    TorchShim::Place place;
    if (known_.empty() || !shim_->kind(tensor, kind)) return false;
    for (const Known& known : known_) {
        if (known.type != Py_TYPE(tensor) || !(known.kind == kind)) continue;
        if (!shim_->place(tensor, place)) return false;
        out = {place.data, known.device, known.dtype, static_cast<int32_t>(place.ndim), place.shape, place.strides};
        return true;
    }
    return false;
}

}  // namespace lookahead_fused
