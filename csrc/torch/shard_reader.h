// Reads a DTensor: the tensor that this rank has of it, and whether two of them are placed alike. A step asks this of
// every sharded parameter, its gradient and its state, so that it may cost no more than reading the tensor itself.
#pragma once

#include "slot.h"
#include "tensor_reader.h"

namespace lookahead_fused {

class ShardReader {
   public:
    // Placements that were equal, and are while these two are: tuples do not change, nor what stands in them.
    struct Alike {
        py::object own, other;
    };

    explicit ShardReader(const TensorReader& tensors) : tensors_(tensors) {}

    // The tensor itself where it has memory of its own; of a DTensor the part on this rank. Borrowed. Null for what is
    // neither: of another class, or still on its way from another rank.
    PyObject* local(PyObject* tensor) const { return tensors_.is_plain(tensor) ? tensor : part(tensor); }

    // Whether two DTensors of one class lie on the very same mesh in equal placements. False says nothing: Python tells
    // whether what is not the same is equal.
    bool placed_alike(PyObject* own, PyObject* other, Alike& seen) const;

   private:
    // The same of what is not itself such a tensor.
    PyObject* part(PyObject* tensor) const;

    const TensorReader& tensors_;
    Slot local_{"_local_tensor"}, spec_{"_spec"};
};

}  // namespace lookahead_fused
