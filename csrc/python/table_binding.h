// The table as Python makes and keeps it: parameters, state tensors and parameter groups in, rows and chunks out, and
// once a step a check that all of it still is where it was.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "../table/table.h"
#include "tensor_reader.h"

namespace lookahead_fused {

// The rule as a backend names it, for matching hyperparameters and state by name.
struct RuleNames {
    std::string name;
    std::vector<std::string> hypers;
    std::vector<std::string> moments;
};

// One per rule header; also what Python checks its own statement of a rule against.
const std::vector<RuleNames>& rule_names();

// One value of a parameter group, and where in a Group it goes.
struct Field {
    enum Kind {
        NUMBER,    // a float or int between low and high
        PRESENCE,  // a NUMBER whose being zero or not decides what state there is
        SWITCH     // anything else: another value needs another table
    };
    PyObject* key;    // borrowed from the fields tuple
    Py_ssize_t item;  // index into a pair such as betas, or -1
    int slot;         // index into Group::hyper, or one of the below
    Kind kind;
    double low, high;

    enum Slot { ALPHA = 100, K, PULLBACK, WATCHED_ONLY };
};

class TableBinding {
   public:
    // See lookahead_fused/table.py, which is the only caller, for what the arguments hold.
    TableBinding(py::handle tensor_type, TensorReader::Way fastest, const std::string& rule,
                 const std::string& param_dtype, const std::string& grad_dtype, py::list rows, py::list groups,
                 py::tuple fields, py::object conform, py::object read_group, int64_t chunk_elements);

    // Reads the step's gradients and hyperparameters. False: something else changed, and a new table must be made.
    // Whatever Python finds wrong with a gradient or a hyperparameter is raised from here. With read_gradients false
    // every row takes part, for a rule that reads none; with deep false the state tensors are taken to be where they
    // were, and not looked at: five times as many as the parameters, they do not fit a cache.
    bool refresh(bool read_gradients, bool deep);
    // Lets go of the step's gradients.
    void release();

    // What this step writes, or what shares its version counter: parameters, and with deep their state.
    py::list updated(bool deep);

    Table view() const;
    bool reads_gradient() const { return reads_gradient_; }
    TensorReader::Way way() const { return reader_.way(); }
    const std::string& rule() const { return rule_.name; }
    Dtype param_dtype() const { return param_dtype_; }
    Dtype grad_dtype() const { return grad_dtype_; }
    int device_type() const { return device_.device.type; }
    int device_id() const { return device_.device.id; }

    // For Python's garbage collector.
    int traverse(visitproc visit, void* argument) const;
    void clear();

   private:
    // What a step reads of every row comes first.
    struct Tensors {
        PyObject* owner;     // the parameter itself, whose .grad is read
        bool conform;        // its gradient always goes through Python
        bool updated;        // it took part in the last step that was refreshed, and is in updated_
        Description layout;  // of the parameter; shape and strides in layouts_
        PyObject* column[COLUMNS];
        PyObject* version;  // shares the owner's version counter
    };
    struct GroupSource {
        PyObject* dict;
        std::vector<py::object> values;  // as last read, one for each field
        bool lr_each_step = false;       // a tensor that is not where the table is
        PyObject* lr_tensor = nullptr;
    };

    void add_row(py::tuple row);
    void add_field(py::tuple field);
    bool read(size_t group);
    void read_in_python(size_t group);
    void assign(Group& group, const Field& field, double value);
    bool fits(const Description& tensor, int column, const Tensors& row) const;
    bool refresh_gradient(size_t row);

    TensorReader reader_;
    RuleNames rule_;
    bool reads_gradient_;
    Dtype param_dtype_, grad_dtype_;
    dlpack::DataType column_dtype_[COLUMNS];
    // Everything Python that is kept past a call, in one tuple, where the garbage collector can see it: a parameter's
    // hook may hold the optimizer that holds this.
    py::tuple held_;
    PyObject* conform_;
    PyObject* read_group_;
    std::vector<Field> fields_;
    Description device_;
    std::vector<Tensors> tensors_;
    std::vector<int64_t> layouts_;
    std::vector<GroupSource> sources_;
    std::vector<Row> rows_;
    std::vector<Group> groups_;
    std::vector<Chunk> chunks_;
    std::vector<PyObject*> gradients_;  // owned, during a step
    py::object updated_;                // the list that updated() gave last; none where other rows took part since
};

// Adds the class to a backend's module.
void bind_table(py::module_& module);

}  // namespace lookahead_fused
