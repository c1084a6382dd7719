// The parameter groups as numbers: what a table's rows are told of their hyperparameters, read anew where it changed.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../table/table.h"
#include "../torch/tensor_reader.h"

namespace lookahead_fused {

// One value of a parameter group, and where in a Group it goes.
struct Field {
    enum Kind : int {
        NUMBER,    // a float or int between low and high
        PRESENCE,  // a NUMBER whose being zero or not decides what state there is
        SWITCH     // anything else: another value needs another table
    };
    // A slot from here on is the policy's; a negative one is watched and not written.
    static constexpr int POLICY = MAX_RULE_HYPERS;

    PyObject* key;    // borrowed from the fields tuple
    Py_ssize_t item;  // index into a pair such as betas, or -1
    int slot;
    Kind kind;
    double low, high;  // outside of these, and where it is no plain number, Python is asked
};

// Of a dictionary's key: a name that was interned, or one that a checkpoint has brought.
inline bool same_name(PyObject* key, PyObject* name) {
    return key == name || (PyUnicode_Check(key) && PyUnicode_Compare(key, name) == 0);
}

class GroupReader {
   public:
    // fields: (key, item, slot, kind, low, high) each. read_group(group) validates a group and gives its fields as
    // numbers, or raises.
    GroupReader(py::tuple fields, py::object read_group);

    // The index that rows of this parameter group name.
    int32_t add(TensorReader& tensors, const Description& device, py::dict group);

    // False: a value changed that needs another table. Raises what Python finds wrong.
    bool refresh(TensorReader& tensors, const Description& device);

    const std::vector<Group>& groups() const { return groups_; }

    int traverse(visitproc visit, void* argument) const;
    void clear();

   private:
    struct Source {
        PyObject* dict;                       // borrowed: the optimizer's list has it
        std::vector<py::object> values;       // as last read, one for each field
        std::vector<Py_ssize_t> places = {};  // of their entries in the dictionary, as PyDict_Next counts
        bool each_step = false;               // a tensor that is not where the table is
        PyObject* live[MAX_LIVE] = {};        // those in the group's, of `values`
    };

    PyObject* look_up(Source& source, size_t field) const;
    bool read(TensorReader& tensors, const Description& device, size_t index);
    void read_in_python(TensorReader& tensors, const Description& device, size_t index);
    static void assign(Group& group, int slot, double value);
    static bool is_live(const Source& source, PyObject* tensor);

    py::tuple fields_tuple_;
    py::object read_group_;
    std::vector<Field> fields_;
    std::vector<Source> sources_;
    std::vector<Group> groups_;
};

}  // namespace lookahead_fused
