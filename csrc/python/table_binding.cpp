#include "table_binding.h"

#include <pybind11/stl.h>

#include <cmath>
#include <limits>

#include "../rules/adam.h"
#include "../rules/sgd.h"
#include "../rules/sync.h"
#include "collected.h"

namespace lookahead_fused {
namespace {

template <class Rule>
RuleNames names_of() {
    static_assert(static_cast<int>(Rule::HYPERS) <= MAX_HYPERS, "a Group has no room for this rule's hyperparameters");
    static_assert(MOMENT + static_cast<int>(Rule::MOMENTS) <= COLUMNS, "a Row has no room for this rule's moments");
    return {Rule::name,
            {std::begin(Rule::hyper_names), std::end(Rule::hyper_names)},
            {std::begin(Rule::moment_names), std::end(Rule::moment_names)}};
}

const RuleNames& named(const std::string& name) {
    for (const auto& rule : rule_names()) {
        if (rule.name == name) return rule;
    }
    throw py::value_error("no rule is called '" + name + "'");
}

}  // namespace

const std::vector<RuleNames>& rule_names() {
    static const std::vector<RuleNames> rules = {names_of<Adam>(), names_of<Sgd>(), names_of<SyncOnly>()};
    return rules;
}

TableBinding::TableBinding(py::handle tensor_type, TensorReader::Way fastest, const std::string& rule,
                           const std::string& param_dtype, const std::string& grad_dtype, py::list rows,
                           py::list groups, py::tuple fields, py::object conform, py::object read_group,
                           int64_t chunk_elements)
    : reader_(tensor_type, fastest),
      rule_(named(rule)),
      reads_gradient_(rule != SyncOnly::name),
      param_dtype_(dtype_named(param_dtype)),
      grad_dtype_(dtype_named(grad_dtype)),
      held_(py::make_tuple(py::tuple(rows), py::tuple(groups), fields, conform, read_group)),
      conform_(conform.ptr()),
      read_group_(read_group.ptr()) {
    if (chunk_elements <= 0 || chunk_elements > std::numeric_limits<int32_t>::max()) {
        throw py::value_error("chunk_elements must lie between 1 and 2^31 - 1");
    }
    if (rows.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
        throw py::value_error("a table has at most 2^31 - 1 rows");
    }
    const Dtype compute = param_dtype_ == Dtype::FLOAT64 ? Dtype::FLOAT64 : Dtype::FLOAT32;
    for (auto& dtype : column_dtype_) dtype = dlpack_dtype(compute);
    column_dtype_[PARAM] = dlpack_dtype(param_dtype_);
    column_dtype_[GRAD] = dlpack_dtype(grad_dtype_);
    column_dtype_[STEP] = dlpack_dtype(Dtype::FLOAT64);

    for (const py::handle field : fields) add_field(py::reinterpret_borrow<py::tuple>(field));
    tensors_.reserve(rows.size());
    const py::tuple kept_rows = held_[0], kept_groups = held_[1];
    groups_.resize(kept_groups.size());
    sources_.resize(kept_groups.size());
    for (const py::handle row : kept_rows) add_row(py::reinterpret_borrow<py::tuple>(row));
    const int64_t* layout = layouts_.data();
    for (Tensors& row : tensors_) {
        row.layout.shape = layout;
        row.layout.strides = layout + row.layout.ndim;
        layout += 2 * row.layout.ndim;
    }
    gradients_.resize(rows_.size(), nullptr);
    for (size_t i = 0; i < kept_groups.size(); ++i) {
        sources_[i].dict = kept_groups[i].ptr();
        sources_[i].values.resize(fields_.size());
        read_in_python(i);
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
        const int64_t numel = rows_[i].numel;
        for (int64_t offset = 0; offset < numel; offset += chunk_elements) {
            const int64_t count = numel - offset < chunk_elements ? numel - offset : chunk_elements;
            chunks_.push_back({offset, static_cast<int32_t>(i), static_cast<int32_t>(count)});
        }
    }
}

void TableBinding::add_field(py::tuple tuple) {
    // The names are interned, so that the dictionaries find them by identity.
    Field field;
    field.key = tuple[0].ptr();
    field.item = tuple[1].cast<Py_ssize_t>();
    const auto slot = tuple[2].cast<std::string>();
    const auto kind = tuple[3].cast<std::string>();
    field.low = tuple[4].cast<double>();
    field.high = tuple[5].cast<double>();
    field.kind = kind == "number" ? Field::NUMBER : kind == "presence" ? Field::PRESENCE : Field::SWITCH;
    field.slot = slot == "alpha"      ? Field::ALPHA
                 : slot == "k"        ? Field::K
                 : slot == "pullback" ? Field::PULLBACK
                 : slot.empty()       ? Field::WATCHED_ONLY
                                      : -1;
    for (size_t i = 0; i < rule_.hypers.size(); ++i) {
        if (slot == rule_.hypers[i]) field.slot = static_cast<int>(i);
    }
    if (field.slot < 0) throw py::value_error("rule '" + rule_.name + "' has no hyperparameter '" + slot + "'");
    fields_.push_back(field);
}

// (owner, conform, group, moments_loaded, (a tensor or None for each column), (a tensor with the owner's version
// counter, ...))
void TableBinding::add_row(py::tuple row) {
    const py::tuple columns = row[4];
    if (columns.size() != COLUMNS) throw py::value_error("a row has " + std::to_string(COLUMNS) + " columns");
    Tensors tensors{};
    Row plain{};
    tensors.owner = row[0].ptr();
    tensors.conform = row[1].cast<bool>();
    tensors.version = py::tuple(row[5])[0].ptr();
    plain.group = row[2].cast<int32_t>();
    plain.moments_loaded = row[3].cast<bool>();
    if (plain.group < 0 || static_cast<size_t>(plain.group) >= groups_.size()) {
        throw py::index_error("a row names group " + std::to_string(plain.group));
    }

    if (!reader_.describe(columns[PARAM].ptr(), tensors.layout)) {
        throw py::value_error("a parameter's memory cannot be described");
    }
    if (rows_.empty()) device_ = tensors.layout;
    plain.numel = tensors.layout.numel();
    // The vector may move as it grows; the constructor sets the pointers when all rows are there.
    const size_t begin = layouts_.size();
    const int32_t ndim = tensors.layout.ndim;
    layouts_.insert(layouts_.end(), tensors.layout.shape, tensors.layout.shape + ndim);
    layouts_.insert(layouts_.end(), tensors.layout.strides, tensors.layout.strides + ndim);
    tensors.layout.shape = layouts_.data() + begin;
    tensors.layout.strides = layouts_.data() + begin + ndim;

    for (int i = 0; i < COLUMNS; ++i) {
        const py::handle tensor = columns[i];
        if (tensor.is_none()) continue;
        Description described;
        if (i == GRAD || !reader_.describe(tensor.ptr(), described) || !fits(described, i, tensors)) {
            throw py::value_error("column " + std::to_string(i) +
                                  " of a row does not match its parameter in device, dtype, shape or strides");
        }
        tensors.column[i] = tensor.ptr();
        plain.column[i] = described.data;
    }
    rows_.push_back(plain);
    tensors_.push_back(tensors);
}

bool TableBinding::fits(const Description& tensor, int column, const Tensors& row) const {
    if (!tensor.same_device(device_) || !(tensor.dtype == column_dtype_[column])) return false;
    return column == STEP ? tensor.ndim == 0 : tensor.same_layout(row.layout);
}

bool TableBinding::refresh(bool read_gradients, bool deep) {
    release();
    for (size_t i = 0; i < sources_.size(); ++i) {
        if (!read(i)) return false;
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
        Tensors& row = tensors_[i];
        for (int column = PARAM; column < (deep ? COLUMNS : PARAM + 1); ++column) {
            if (row.column[column] == nullptr) continue;
            Description described;
            if (!reader_.describe(row.column[column], described) || described.data != rows_[i].column[column] ||
                !fits(described, column, row)) {
                release();
                return false;
            }
        }
        if (!read_gradients) {
            rows_[i].column[GRAD] = row.owner;
        } else if (!refresh_gradient(i)) {
            release();
            return false;
        }
        const bool active = rows_[i].column[GRAD] != nullptr;
        if (active != row.updated) updated_ = py::object();
        row.updated = active;
    }
    return true;
}

bool TableBinding::refresh_gradient(size_t i) {
    const Tensors& row = tensors_[i];
    PyObject* gradient = reader_.gradient(row.owner);
    if (gradient == Py_None) {
        Py_DECREF(gradient);
        rows_[i].column[GRAD] = nullptr;
        return true;
    }
    gradients_[i] = gradient;
    if (!reads_gradient_) {
        rows_[i].column[GRAD] = gradient;
        return true;
    }
    Description described;
    // A negated view is the imaginary half of a complex tensor, with even strides: only one element can pass for dense.
    // A tensor of zeros that torch has not made has no address.
    if (row.conform || !reader_.describe(gradient, described) || !fits(described, GRAD, row) ||
        (described.data == nullptr && rows_[i].numel != 0) ||
        (rows_[i].numel == 1 && !described.has_odd_stride() && reader_.is_negated(gradient))) {
        // Python says what is wrong with it, or gives a copy in the parameter's layout; None asks for another table.
        py::object conformed = py::reinterpret_steal<py::object>(
            PyObject_CallFunction(conform_, "nO", static_cast<Py_ssize_t>(i), gradient));
        if (!conformed) throw py::error_already_set();
        if (conformed.is_none()) return false;
        Py_DECREF(gradients_[i]);
        gradients_[i] = conformed.release().ptr();
        if (!reader_.describe(gradients_[i], described) || !fits(described, GRAD, row)) {
            throw py::value_error("a gradient could not be brought into its parameter's layout");
        }
    }
    // An empty tensor has no address, and yet takes the step.
    rows_[i].column[GRAD] = rows_[i].numel == 0 ? static_cast<void*>(gradients_[i]) : described.data;
    return true;
}

void TableBinding::release() {
    for (auto& gradient : gradients_) Py_CLEAR(gradient);
}

// The group's values, where they are the same objects as last time, are the same values.
bool TableBinding::read(size_t index) {
    GroupSource& source = sources_[index];
    Group& group = groups_[index];
    bool ask_python = source.lr_each_step;
    for (size_t i = 0; i < fields_.size(); ++i) {
        const Field& field = fields_[i];
        PyObject* value = PyDict_GetItemWithError(source.dict, field.key);
        if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
        if (value != nullptr && field.item >= 0) {
            if (!PyTuple_CheckExact(value) || field.item >= PyTuple_GET_SIZE(value)) {
                ask_python = true;
                continue;
            }
            value = PyTuple_GET_ITEM(value, field.item);
        }
        // An entry may be missing where Python has a default for it.
        if (value == source.values[i].ptr()) continue;
        if (value == nullptr) return false;
        double number = std::numeric_limits<double>::quiet_NaN();
        if (PyFloat_CheckExact(value)) {
            number = PyFloat_AS_DOUBLE(value);
        } else if (PyLong_CheckExact(value) && field.slot != Field::K) {
            number = PyLong_AsDouble(value);
            if (PyErr_Occurred()) PyErr_Clear();
        }
        const bool zeroness =
            field.kind == Field::PRESENCE && field.slot < MAX_HYPERS && (group.hyper[field.slot] != 0) != (number != 0);
        if (field.kind == Field::SWITCH || zeroness || (field.slot == 0 && source.lr_tensor != nullptr)) return false;
        if (field.slot == Field::K || !(number >= field.low && number <= field.high)) {
            ask_python = true;
            continue;
        }
        assign(group, field, number);
        source.values[i] = py::reinterpret_borrow<py::object>(value);
    }
    if (ask_python) read_in_python(index);
    if (source.lr_tensor != nullptr) {
        Description described;
        if (!reader_.describe(source.lr_tensor, described) || described.data != group.lr) return false;
    }
    return true;
}

// Validates the group, or raises; sees every kind of value that a group may hold.
void TableBinding::read_in_python(size_t index) {
    GroupSource& source = sources_[index];
    Group& group = groups_[index];
    const py::object read =
        py::reinterpret_steal<py::object>(PyObject_CallFunctionObjArgs(read_group_, source.dict, nullptr));
    if (!read) throw py::error_already_set();
    const py::tuple values = read;
    source.lr_each_step = false;
    source.lr_tensor = nullptr;
    group.lr = nullptr;
    for (size_t i = 0; i < fields_.size(); ++i) {
        const Field& field = fields_[i];
        py::object value = py::reinterpret_borrow<py::object>(PyDict_GetItem(source.dict, field.key));
        if (value && field.item >= 0) value = value[py::int_(field.item)];
        source.values[i] = value;
        if (field.slot == Field::K) {
            group.k = py::object(values[i]).cast<int64_t>();
        } else {
            assign(group, field, py::object(values[i]).cast<double>());
        }
        if (field.slot == 0 && reads_gradient_ && value && reader_.is_tensor(value.ptr())) {
            Description described;
            const bool readable =
                reader_.describe(value.ptr(), described) && described.same_device(device_) && described.numel() == 1;
            group.lr_is_double = described.dtype == dlpack_dtype(Dtype::FLOAT64);
            if (readable && (group.lr_is_double || described.dtype == dlpack_dtype(Dtype::FLOAT32))) {
                group.lr = described.data;
                source.lr_tensor = value.ptr();
            } else {
                source.lr_each_step = true;
            }
        }
    }
}

void TableBinding::assign(Group& group, const Field& field, double value) {
    if (field.slot < MAX_HYPERS) group.hyper[field.slot] = value;
    if (field.slot == Field::ALPHA) group.alpha = value;
    if (field.slot == Field::PULLBACK) group.pullback = static_cast<int32_t>(value);
}

py::list TableBinding::updated(bool deep) {
    if (!updated_) {
        py::list active;
        for (const Tensors& row : tensors_) {
            if (row.updated) active.append(py::handle(row.version));
        }
        updated_ = std::move(active);
    }
    if (!deep) return updated_;
    auto all = py::reinterpret_steal<py::list>(PyList_GetSlice(updated_.ptr(), 0, PyList_GET_SIZE(updated_.ptr())));
    if (!all) throw py::error_already_set();
    for (const Tensors& row : tensors_) {
        for (int column = MASTER; row.updated && column < COLUMNS; ++column) {
            if (row.column[column] != nullptr) all.append(py::handle(row.column[column]));
        }
    }
    return all;
}

Table TableBinding::view() const {
    const auto count = [](const auto& of) { return static_cast<int64_t>(of.size()); };
    return {rows_.data(), count(rows_), groups_.data(), count(groups_), chunks_.data(), count(chunks_)};
}

int TableBinding::traverse(visitproc visit, void* argument) const {
    return visit_all({held_.ptr(), updated_.ptr()}, visit, argument);
}

void TableBinding::clear() {
    release();
    rows_.clear();
    tensors_.clear();
    sources_.clear();
    chunks_.clear();
    updated_ = py::object();
    held_ = py::tuple();
    groups_.clear();
}

}  // namespace lookahead_fused
