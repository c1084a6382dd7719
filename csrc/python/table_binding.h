// The table as Python makes and keeps it: parameters, their state and their groups in, rows and chunks out. Once a step
// every tensor is looked at where it is now; none is held between two steps, so that memory which the optimizer no
// longer needs is free when its owner lets it go. Only pinned host memory, which a device reaches by its address, is
// held until its row lies elsewhere.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <unordered_map>
#include <vector>

#include "../table/table.h"
#include "../torch/shard_reader.h"
#include "../torch/tensor_reader.h"
#include "group_reader.h"

namespace lookahead_fused {

// A rule or policy as a backend names it, for matching hyperparameters and state by name.
struct Names {
    std::string name;
    std::vector<std::string> hypers;
    std::vector<std::string> moments;
    std::vector<bool> squares;  // of each of these whether it is one
};

// One for each rule and each policy; also what Python checks its own statements against.
const std::vector<Names>& rule_names();
const std::vector<Names>& policy_names();

class TableBinding {
   public:
    // See lookahead_fused/_parts.py, which is the only caller, for what the arguments hold. entries: for each column
    // the name of its entry in a parameter's state, None where it has none.
    TableBinding(py::handle tensor_type, TensorReader::Way fastest, const std::string& rule, const std::string& policy,
                 const std::string& param_dtype, const std::string& grad_dtype, const std::string& state_dtype,
                 py::tuple entries, py::tuple fields, py::object conform, py::object hold, py::object read_group,
                 int64_t chunk_elements);

    int32_t add_group(py::dict group) { return groups_.add(reader_, device_, group); }
    // The device of the first row is the table's, so it has to be known before a group is added.
    void set_device(py::handle tensor);

    // Throws where a tensor does not fit its column. copy: what the row has in place of an owner that is not dense, or
    // None. present: of each column, whether this row has it. hosted: whether it lies in pinned host memory, beside a
    // table of another device. acts_on_moment: whether the policy's event does. version: what shares the owner's
    // version counter, first in a tuple, or None.
    void add_row(py::object owner, py::object copy, py::dict state, int32_t group, py::tuple present, py::tuple hosted,
                 bool moments_loaded, bool acts_on_moment, py::object version);

    // Looks at everything that a pass reads or writes. False: something is not what its row was made of, and has to be
    // looked at in Python. Whatever Python finds wrong with a gradient or a hyperparameter is raised from here. The
    // owners must be alive: the Watch tells. In Pass::SYNC every row takes part, no gradient is read, and of moments
    // only the one that the policy acts on is looked at. event_later: see StepArguments.
    bool refresh(py::dict state, Pass pass, bool event_later);
    // Lets go of the step's gradients.
    void release();

    // The tensors whose versions this pass must bump: parameters, and of their state what somebody holds besides.
    py::list updated();

    // The pinned host memory that rows name.
    py::list pinned() const;

    // What the rows that take part in this pass write: the parameters, and their state.
    std::pair<py::list, py::list> tensors() const;

    Table view() const;
    Pass pass() const { return pass_; }
    int32_t event_later() const { return event_later_; }
    bool reads_gradient() const { return reads_gradient_ && pass_ == Pass::STEP; }
    TensorReader::Way way() const { return reader_.way(); }
    const std::string& rule() const { return rule_.name; }
    Dtype param_dtype() const { return param_dtype_; }
    Dtype grad_dtype() const { return grad_dtype_; }
    Dtype state_dtype() const { return state_dtype_; }
    int device_type() const { return device_.device.type; }
    int device_id() const { return device_.device.id; }
    // Rises whenever a row's state lies elsewhere than before: a copy of the rows on a device is then out of date.
    int64_t moves() const { return moves_; }

    // For Python's garbage collector.
    int traverse(visitproc visit, void* argument) const;
    void clear();

   private:
    // What a step reads of every row comes first.
    struct Tensors {
        PyObject* owner;         // borrowed: the parameter itself, whose .grad is read
        Py_ssize_t place;        // of its entries in the state, as PyDict_Next counts
        uint32_t present;        // which columns from STEP on the row has, a bit each
        uint32_t hosted;         // which of them lie in pinned host memory
        int32_t entry[COLUMNS];  // of each of these columns its place among the entries
        bool is_shard;           // its memory is its owner's part on this rank
        bool own_gradient;       // its class gives `grad` a meaning of its own
        bool acts_on_moment;     // an event changes its first moment
        bool updated;            // it took part in the last pass, and is in updated_
        Description layout;      // of the parameter; shape and strides in layouts_
        PyObject* version;       // held in held_
        PyObject* copy;          // held in held_, or null
        Description blocks;      // as `layout`: a number for each block of codes
        PyObject*
            tensor[COLUMNS];  // what the last pass that the row took part in found there; not to be followed later
    };

    bool refresh_row(size_t row, PyObject* state);
    bool refresh_state(size_t row, PyObject* state);
    bool refresh_gradient(size_t row);
    // The columns that this pass looks at, a bit each. What it leaves alone stays where a step last found it: captured
    // graphs of steps read the same rows.
    uint32_t in_pass(const Tensors& row) const {
        constexpr uint32_t BEFORE_MOMENTS = (1u << MOMENT) - 1;
        if (pass_ == Pass::STEP) return row.present;
        constexpr uint32_t FIRST_MOMENT = 1u << MOMENT | 1u << MOMENT_SCALE;
        return row.present & (row.acts_on_moment ? BEFORE_MOMENTS | FIRST_MOMENT : BEFORE_MOMENTS);
    }
    bool find_place(Tensors& row, PyObject* state, PyObject** entries) const;
    bool find_entry(Tensors& row, int column, PyObject* entries, PyObject** value) const;
    // What may be read as it lies; borrowed. Null where Python has to bring it into its row's form.
    PyObject* local_gradient(size_t i, PyObject* gradient) {
        const Tensors& row = tensors_[i];
        if (!row.is_shard) return row.copy == nullptr && reader_.is_plain(gradient) ? gradient : nullptr;
        return shards_.placed_alike(row.owner, gradient, alike_[i]) ? shards_.local(gradient) : nullptr;
    }
    bool fits(const Description& tensor, int column, const Tensors& row) const;
    bool find(PyObject* tensor, int column, size_t row, void** address);
    bool hold(PyObject* tensor, int column, size_t row);

    TensorReader reader_;
    ShardReader shards_{reader_};
    Names rule_;
    int32_t policy_;  // its place in the list
    bool reads_gradient_;
    Dtype param_dtype_, grad_dtype_, state_dtype_;
    dlpack::DataType column_dtype_[COLUMNS];
    // Of the tensors that were last described, by where they lie, on the device or the host, and the type of their
    // column.
    TorchShim::Marks marks_[2][ColumnFacts::TYPES];
    py::tuple entries_;
    py::object conform_, hold_;
    // What `hold` gave, by row and column: memory that is held is no other's, and its address need not be asked again
    // whether a device may use it.
    std::unordered_map<size_t, py::object> pinned_;
    int64_t chunk_elements_;
    GroupReader groups_;
    Description device_;
    bool on_host_ = false;
    std::vector<Tensors> tensors_;
    std::vector<std::vector<int64_t>> layouts_;
    std::vector<ShardReader::Alike> alike_;  // of rows that are shards, the placements of owner and gradient
    std::vector<Row> rows_;
    std::vector<Chunk> chunks_;
    py::list held_;                     // versions and copies, where the garbage collector can see them
    std::vector<PyObject*> gradients_;  // owned, during a step
    std::vector<PyObject*> shared_;     // state of this pass that somebody holds besides the optimizer
    py::object updated_;                // the list of parameters that took part; none where others did since
    Pass pass_ = Pass::STEP;
    bool event_later_ = false;
    int64_t moves_ = 0;
};

// Adds the class to a backend's module.
void bind_table(py::module_& module);

}  // namespace lookahead_fused
