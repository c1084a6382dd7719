// Notices, in a few nanoseconds a parameter, that the optimizer's groups are not what the tables were made of: a group
// or parameter added or replaced, a parameter that got its first gradient.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../torch/tensor_reader.h"

namespace lookahead_fused {

class Watch {
   public:
    enum class Seen : int { CURRENT, WOKEN, STALE };

    // dormant: the parameters that have no row, since they never had a gradient. Groups and parameters are known by
    // their addresses and not held: what was replaced is free at once. An address that was given to another object
    // meanwhile does no harm, since every tensor is looked at anew in every step.
    Watch(py::handle tensor_type, py::list groups, py::list dormant);

    // CURRENT: all is as it was. WOKEN: all is, but that a dormant parameter has a gradient. STALE: else.
    Seen look(py::list groups) const;

   private:
    struct Group {
        PyObject* group;
        std::vector<PyObject*> params;
    };

    TensorReader reader_;
    std::vector<Group> groups_;
    std::vector<PyObject*> dormant_;
};

void bind_watch(py::module_& module);

}  // namespace lookahead_fused
