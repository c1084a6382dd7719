// Reads a torch tensor from Python without any header of torch: where it lies, what it holds, and a parameter's
// gradient. This is per tensor and per step, so it is counted in tens of nanoseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../table/table.h"
#include "dlpack_abi.h"

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
    // The same shape, and strides that differ at most where a size of 1 makes them meaningless.
    bool same_layout(const Description& other) const;
};

Dtype dtype_named(const std::string& name);
dlpack::DataType dlpack_dtype(Dtype dtype);
inline bool operator==(dlpack::DataType a, dlpack::DataType b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// Not copied, and alive as long as the table it reads for.
class TensorReader {
   public:
    // tensor_type is torch.Tensor. Torch has the exchange API since 2.10; without it, or with use_exchange_api false,
    // the same facts are asked of the tensor's Python attributes, at some microseconds a tensor.
    TensorReader(py::handle tensor_type, bool use_exchange_api);

    // False, with no Python error set, for a tensor that has no address: a sparse one, say.
    bool describe(PyObject* tensor, Description& out);
    // A new reference; None where there is no gradient. Throws what the getter raised.
    PyObject* gradient(PyObject* tensor) const;
    // The lazy negation torch puts on a view such as x.conj().imag; the memory holds the opposite sign.
    bool is_negated(PyObject* tensor) const;
    bool is_plain_tensor(PyObject* object) const { return Py_TYPE(object) == tensor_type_; }
    bool is_tensor(PyObject* object) const { return PyObject_TypeCheck(object, tensor_type_); }

   private:
    bool describe_by_attributes(PyObject* tensor, Description& out);

    PyTypeObject* tensor_type_;
    const dlpack::ExchangeApi* api_ = nullptr;
    getter gradient_;
    void* gradient_closure_;
    PyCFunction is_negated_;
    // What describe_by_attributes last returned points here.
    std::vector<int64_t> shape_, strides_;
};

}  // namespace lookahead_fused
