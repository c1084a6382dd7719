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
#include <cstring>

namespace lookahead_fused {

class TorchShim {
   public:
    // Of more, shape and strides do not lie in the at::TensorImpl itself.
    static constexpr int MOST_DIMENSIONS = 5;

    // What the ABI has numbers of its own for. Torch 2.6 has none for a layout: there a sparse tensor has the kind of a
    // dense one, and no place.
    struct Kind {
        int32_t layout = -1, dtype = -1, device_type = -1, device_index = -1;
    };
    struct Place {
        void* data = nullptr;
        int64_t ndim = 0;
        int64_t* shape = nullptr;
        int64_t* strides = nullptr;
    };

    // What an at::TensorImpl has to say besides its shape and strides.
    struct Marks {
        uint32_t dtype_and_device = 0;
        uint64_t keys = 0;  // its dispatch keys: layout, device, class, and whether it is a lazily negated view
        bool known = false;
    };

    // Null where this torch or this system has none. Any tensor will do, and it is looked for once in a process.
    static const TorchShim* find(PyObject* tensor);

    // False where torch refuses. A place has only a tensor with memory of its own; of another, torch prints an error.
    bool kind(PyObject* tensor, Kind& out) const;
    bool place(PyObject* tensor, Place& out) const;
    const void* implementation(PyObject* tensor) const { return *static_cast<void**>(handle(tensor)); }

    // Whether a tensor is like one described before, by comparing what lies in its at::TensorImpl instead of asking the
    // eight functions above: a step over 1000 tensors of AdamW asks this 6000 times. Experiments with torch itself tell
    // where things lie, once in a process; where one of them does not come out as expected no marks are known.
    bool marks(PyObject* tensor, Marks& out) const;
    bool is_like(PyObject* tensor, const Marks& marks, int32_t ndim, const int64_t* shape,
                 const int64_t* strides) const;
    // Whether a tensor's storage holds so many elements from the tensor's first on. A view of a storage that was freed
    // has an address all the same: its offset.
    bool holds(PyObject* tensor, int64_t elements, int64_t element_bytes) const {
        int64_t bytes = 0, offset = 0;
        return storage_size_(handle(tensor), &bytes) == 0 && storage_offset_(handle(tensor), &offset) == 0 &&
               bytes / element_bytes - offset >= elements;
    }
    // Of a tensor that is.
    void* data(PyObject* tensor) const {
        void* address = nullptr;
        return data_(handle(tensor), &address) == 0 ? address : nullptr;
    }

   private:
    bool load(PyObject* tensor);
    void* handle(PyObject* tensor) const { return reinterpret_cast<char*>(tensor) + offset_; }

    template <class T>
    using Getter = int32_t (*)(void* tensor, T* out);

    bool find_insides();
    template <class Word>
    Word word(PyObject* tensor, size_t at) const {
        Word value;
        std::memcpy(&value, static_cast<const char*>(implementation(tensor)) + at, sizeof(value));
        return value;
    }

    size_t offset_ = 0;
    // Where in an at::TensorImpl these stand, in bytes; 0 where that is not known.
    size_t ndim_at_ = 0, sizes_at_ = 0, strides_at_ = 0, kind_at_ = 0, keys_at_ = 0;
    Getter<int32_t> layout_, dtype_, device_type_, device_index_;
    Getter<void*> data_;
    Getter<int64_t> ndim_, storage_size_, storage_offset_;
    Getter<int64_t*> shape_, strides_;
};

inline bool operator==(const TorchShim::Kind& a, const TorchShim::Kind& b) {
    return a.layout == b.layout && a.dtype == b.dtype && a.device_type == b.device_type &&
           a.device_index == b.device_index;
}

inline bool TorchShim::kind(PyObject* tensor, Kind& out) const {
    void* const t = handle(tensor);
    return (layout_ == nullptr || layout_(t, &out.layout) == 0) && dtype_(t, &out.dtype) == 0 &&
           device_type_(t, &out.device_type) == 0 && device_index_(t, &out.device_index) == 0;
}

inline bool TorchShim::place(PyObject* tensor, Place& out) const {
    void* const t = handle(tensor);
    return data_(t, &out.data) == 0 && ndim_(t, &out.ndim) == 0 && shape_(t, &out.shape) == 0 &&
           strides_(t, &out.strides) == 0;
}

inline bool TorchShim::is_like(PyObject* tensor, const Marks& marks, int32_t ndim, const int64_t* shape,
                               const int64_t* strides) const {
    if (!marks.known || ndim > MOST_DIMENSIONS || word<int64_t>(tensor, ndim_at_) != ndim) return false;
    // Not memcmp: a call each, for one or two numbers mostly, is a third of a refresh.
    for (int32_t i = 0; i < ndim; ++i) {
        const size_t at = static_cast<size_t>(i) * sizeof(int64_t);
        if (word<int64_t>(tensor, sizes_at_ + at) != shape[i] ||
            word<int64_t>(tensor, strides_at_ + at) != strides[i]) {
            return false;
        }
    }
    return word<uint32_t>(tensor, kind_at_) == marks.dtype_and_device && word<uint64_t>(tensor, keys_at_) == marks.keys;
}

}  // namespace lookahead_fused
