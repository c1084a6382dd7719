// Notices, in a few nanoseconds a tensor, that a table no longer is what the optimizer's groups and state say: a group
// or parameter added or replaced, a state tensor loaded, replaced or deleted, a parameter that got its first gradient.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "tensor_reader.h"

namespace lookahead_fused {

class Watch {
   public:
    // names are the state entries that matter, dormant the parameters that have no row because they never had a
    // gradient. Objects are known by their address; the watch keeps the groups and parameters alive and the tables
    // keep the state tensors, so that no address is given to another object meanwhile.
    Watch(py::handle tensor_type, py::list groups, py::dict state, py::tuple names, py::list dormant);

    // With deep false, the state's own entries are taken to be what they were.
    bool current(py::list groups, py::dict state, bool deep) const;
    // Nobody but the state and the tables holds a state tensor, or the dict that it is in: until the state is asked for
    // again, none of it can be replaced or moved.
    bool state_is_private(py::dict state) const;

    int traverse(visitproc visit, void* argument) const;
    void clear();

   private:
    bool same_entries(py::dict state) const;

    struct GroupSeen {
        PyObject* group;
        std::vector<PyObject*> params;
    };
    struct StateSeen {
        PyObject* param;
        size_t entries;  // how many of entries_ are this parameter's
    };
    static constexpr size_t NOT_A_DICT = SIZE_MAX;
    struct Entry {
        PyObject* key;
        PyObject* value;  // null where it does not matter
    };

    TensorReader reader_;
    py::tuple held_;
    std::vector<GroupSeen> groups_;
    std::vector<StateSeen> state_;
    std::vector<Entry> entries_;
    std::vector<PyObject*> dormant_;
};

void bind_watch(py::module_& module);

}  // namespace lookahead_fused
