// Torch's stable C ABI (torch/csrc/inductor/aoti_torch/c/shim.h, made for compiled models), as far as it tells where a
// tensor lies. Unlike DLPack it does not touch the tensor's reference count, which for a tensor that only Python holds
// means the interpreter's lock: 20 ns instead of 65.
//
// What the ABI does not tell is where in a Python tensor the at::Tensor stands that its functions take. That is looked
// for once, with the address of the at::TensorImpl that torch._C names; where anything is missing, nothing of this is
// used.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>

namespace lookahead_fused {

class TorchShim {
   public:
    // What the ABI has numbers of its own for.
    struct Kind {
        int32_t layout = -1, dtype = -1, device_type = -1, device_index = -1;
    };
    struct Place {
        void* data = nullptr;
        int64_t ndim = 0;
        int64_t* shape = nullptr;
        int64_t* strides = nullptr;
    };

    // Null where this torch or this system has none. Any tensor will do, and it is looked for once in a process.
    static const TorchShim* find(PyObject* tensor);

    // False where torch refuses. A place has only a tensor with memory of its own; of another, torch prints an error.
    bool kind(PyObject* tensor, Kind& out) const;
    bool place(PyObject* tensor, Place& out) const;

   private:
    bool load(PyObject* tensor);
    void* handle(PyObject* tensor) const { return reinterpret_cast<char*>(tensor) + offset_; }

    template <class T>
    using Getter = int32_t (*)(void* tensor, T* out);

    size_t offset_ = 0;
    Getter<int32_t> layout_, dtype_, device_type_, device_index_;
    Getter<void*> data_;
    Getter<int64_t> ndim_;
    Getter<int64_t*> shape_, strides_;
};

inline bool operator==(const TorchShim::Kind& a, const TorchShim::Kind& b) {
    return a.layout == b.layout && a.dtype == b.dtype && a.device_type == b.device_type &&
           a.device_index == b.device_index;
}

inline bool TorchShim::kind(PyObject* tensor, Kind& out) const {
    void* const t = handle(tensor);
    return layout_(t, &out.layout) == 0 && dtype_(t, &out.dtype) == 0 && device_type_(t, &out.device_type) == 0 &&
           device_index_(t, &out.device_index) == 0;
}

inline bool TorchShim::place(PyObject* tensor, Place& out) const {
    void* const t = handle(tensor);
    return data_(t, &out.data) == 0 && ndim_(t, &out.ndim) == 0 && shape_(t, &out.shape) == 0 &&
           strides_(t, &out.strides) == 0;
}

}  // namespace lookahead_fused
