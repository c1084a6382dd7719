#include "table_binding.h"

#include <pybind11/stl.h>

#include <cmath>
#include <limits>

#include "../rules/all.h"
#include "../slow/all.h"
#include "../state/int8.h"
#include "collected.h"

namespace lookahead_fused {
namespace {

template <class Of>
std::vector<std::string> hyper_names_of() {
    std::vector<std::string> names;
    for (int i = 0; i < static_cast<int>(Of::HYPERS); ++i) names.emplace_back(Of::hyper_names[i]);
    return names;
}

template <class... Members>
std::vector<Names> rules_of(List<Members...>) {
    static_assert(((static_cast<int>(Members::HYPERS) <= MAX_RULE_HYPERS) && ...),
                  "a Group has no room for a rule's hyperparameters");
    static_assert(((MOMENT + static_cast<int>(Members::MOMENTS) <= MOMENT_SCALE) && ...),
                  "a Row has no room for a rule's moments");
    static_assert((!Members::squares[0] && ...), "a policy acts on a moment that has a sign");
    return {Names{Members::name,
                  hyper_names_of<Members>(),
                  {std::begin(Members::moment_names), std::end(Members::moment_names)},
                  std::vector<bool>(std::begin(Members::squares), std::end(Members::squares))}...};
}

template <class... Members>
std::vector<Names> policies_of(List<Members...>) {
    static_assert(((static_cast<int>(Members::HYPERS) <= MAX_POLICY_HYPERS) && ...),
                  "a Group has no room for a policy's hyperparameters");
    return {Names{Members::name, hyper_names_of<Members>(), {}, {}}...};
}

size_t place_of(const std::vector<Names>& all, const std::string& name) {
    for (size_t i = 0; i < all.size(); ++i) {
        if (all[i].name == name) return i;
    }
    throw py::value_error("no rule or policy is called '" + name + "'");
}

bool is_count(double number) { return number >= 0 && std::isfinite(number); }

}  // namespace

const std::vector<Names>& rule_names() {
    static const std::vector<Names> names = rules_of(Rules{});
    return names;
}

const std::vector<Names>& policy_names() {
    static const std::vector<Names> names = policies_of(Policies{});
    return names;
}

TableBinding::TableBinding(py::handle tensor_type, TensorReader::Way fastest, const std::string& rule,
                           const std::string& policy, const std::string& param_dtype, const std::string& grad_dtype,
                           const std::string& state_dtype, py::tuple entries, py::tuple fields, py::object conform,
                           py::object hold, py::object read_group, int64_t chunk_elements)
    : reader_(tensor_type, fastest),
      rule_(rule_names()[place_of(rule_names(), rule)]),
      policy_(static_cast<int32_t>(place_of(policy_names(), policy))),
      reads_gradient_(rule != External::name),
      param_dtype_(dtype_named(param_dtype)),
      grad_dtype_(dtype_named(grad_dtype)),
      state_dtype_(dtype_named(state_dtype)),
      entries_(std::move(entries)),
      conform_(std::move(conform)),
      hold_(std::move(hold)),
      chunk_elements_(chunk_elements),
      groups_(std::move(fields), std::move(read_group)) {
    if (chunk_elements <= 0 || chunk_elements > std::numeric_limits<int32_t>::max()) {
        throw py::value_error("chunk_elements must lie between 1 and 2^31 - 1");
    }
    // A block of codes has one scale, which whoever updates its elements makes anew.
    if (state_dtype_ == Dtype::UINT8 && chunk_elements % CODE_BLOCK != 0) {
        throw py::value_error("chunk_elements must be a multiple of " + std::to_string(CODE_BLOCK) +
                              " where moments lie in codes");
    }
    if (entries_.size() != COLUMNS) throw py::value_error("entries must name each of the columns, or None");
    const Dtype compute = param_dtype_ == Dtype::FLOAT64 ? Dtype::FLOAT64 : Dtype::FLOAT32;
    for (int i = 0; i < COLUMNS; ++i) {
        const Dtype master = param_dtype_ == Dtype::BFLOAT16 ? Dtype::INT16 : compute;
        const Dtype dtype[] = {param_dtype_, grad_dtype_, master, compute, state_dtype_, Dtype::FLOAT64};
        column_dtype_[i] = dlpack_dtype(dtype[COLUMN_FACTS[i].type]);
    }
}

void TableBinding::set_device(py::handle tensor) {
    PyObject* const lies = shards_.local(tensor.ptr());
    if (lies == nullptr || !reader_.describe(lies, device_)) {
        throw py::value_error("a parameter's memory cannot be described");
    }
    on_host_ = device_.device.type == dlpack::CPU;
}

void TableBinding::add_row(py::object owner, py::object copy, py::dict state, int32_t group, py::tuple present,
                           py::tuple hosted, bool moments_loaded, bool acts_on_moment, py::object version) {
    if (rows_.size() >= static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
        throw py::value_error("a table has at most 2^31 - 1 rows");
    }
    if (group < 0 || static_cast<size_t>(group) >= groups_.groups().size()) {
        throw py::index_error("a row names group " + std::to_string(group));
    }
    if (present.size() != COLUMNS || hosted.size() != COLUMNS) {
        throw py::value_error("present and hosted must tell of each of the columns");
    }

    Tensors tensors{};
    Row plain{};
    tensors.owner = owner.ptr();
    tensors.copy = copy.is_none() ? nullptr : copy.ptr();
    tensors.acts_on_moment = acts_on_moment;
    tensors.version = version.is_none() ? nullptr : py::tuple(version)[0].ptr();
    tensors.own_gradient = reader_.has_own_gradient(Py_TYPE(owner.ptr()));
    PyObject* const param = tensors.copy != nullptr ? tensors.copy : shards_.local(owner.ptr());
    tensors.is_shard = tensors.copy == nullptr && param != owner.ptr();
    if (param == nullptr || !reader_.describe(param, tensors.layout)) {
        throw py::value_error("a parameter's memory cannot be described");
    }
    // Most states were made in the order of their parameters.
    if (!tensors_.empty()) tensors.place = tensors_.back().place + 1;
    plain.group = group;
    plain.moments_loaded = moments_loaded;
    plain.numel = tensors.layout.numel();
    // What describes a layout lies in the tensor, which may change: the row keeps a copy of its own.
    const int32_t ndim = tensors.layout.ndim;
    std::vector<int64_t> layout(tensors.layout.shape, tensors.layout.shape + ndim);
    layout.insert(layout.end(), tensors.layout.strides, tensors.layout.strides + ndim);
    layout.insert(layout.end(), {code_blocks(plain.numel), 1});
    tensors.layout.shape = layout.data();
    tensors.layout.strides = layout.data() + ndim;
    tensors.blocks.ndim = 1;
    tensors.blocks.shape = layout.data() + 2 * ndim;
    tensors.blocks.strides = tensors.blocks.shape + 1;
    plain.column[PARAM] = tensors.layout.data;
    if (!fits(tensors.layout, PARAM, tensors) || (plain.numel > 0 && plain.column[PARAM] == nullptr)) {
        throw py::value_error("a parameter does not match its table in device and dtype, or has no memory");
    }
    for (int i = 0; i < COLUMNS; ++i) {
        const bool has = i > GRAD && present[i].cast<bool>();
        const bool required = COLUMN_FACTS[i].required || (i == SLOW && policy_names()[policy_].name != Alone::name);
        if (i > GRAD && required && !has) throw py::value_error("a row lacks a required column");
        if (has) tensors.present |= 1u << i;
        if (has && hosted[i].cast<bool>()) tensors.hosted |= 1u << i;
    }
    const auto lacks_scale = [&](int moment, int scale) {
        const bool coded = state_dtype_ == Dtype::UINT8 && (tensors.present >> moment & 1);
        return coded != static_cast<bool>(tensors.present >> scale & 1);
    };
    bool lacks = lacks_scale(CACHED_MOMENT, CACHED_SCALE);
    for (int m = 0; m < MOMENT_SCALE - MOMENT; ++m) lacks = lacks || lacks_scale(MOMENT + m, MOMENT_SCALE + m);
    if (lacks) throw py::value_error("a row has a scale beside each moment that lies in codes, and no other");

    layouts_.push_back(std::move(layout));
    rows_.push_back(plain);
    tensors_.push_back(tensors);
    alike_.emplace_back();
    gradients_.push_back(nullptr);
    const size_t row = rows_.size() - 1;
    try {
        if (!refresh_state(row, state.ptr())) {
            throw py::value_error("the state of a row does not match its parameter in device, dtype, shape or strides");
        }
    } catch (...) {
        for (size_t i = 0; i < COLUMNS; ++i) pinned_.erase(row * COLUMNS + i);
        layouts_.pop_back();
        rows_.pop_back();
        tensors_.pop_back();
        alike_.pop_back();
        gradients_.pop_back();
        throw;
    }
    held_.append(version);
    if (tensors.copy != nullptr) held_.append(copy);
    for (int64_t offset = 0; offset < plain.numel; offset += chunk_elements_) {
        const int64_t count = plain.numel - offset < chunk_elements_ ? plain.numel - offset : chunk_elements_;
        chunks_.push_back({offset, static_cast<int32_t>(row), static_cast<int32_t>(count)});
    }
    updated_ = py::object();
}

bool TableBinding::fits(const Description& tensor, int column, const Tensors& row) const {
    const bool hosted = row.hosted >> column & 1;
    if (hosted ? !tensor.on_host() : !tensor.same_device(device_)) return false;
    if (!(tensor.dtype == column_dtype_[column])) return false;
    const ColumnFacts::Extent extent = COLUMN_FACTS[column].extent;
    if (extent == ColumnFacts::ONE) return tensor.ndim == 0;
    return tensor.same_layout(extent == ColumnFacts::ELEMENTS ? row.layout : row.blocks);
}

// Where a plain tensor's elements are; false where they are nowhere, or are not what the column holds.
bool TableBinding::find(PyObject* tensor, int column, size_t i, void** address) {
    Tensors& row = tensors_[i];
    static const Description scalar{};
    const ColumnFacts& facts = COLUMN_FACTS[column];
    const bool hosted = row.hosted >> column & 1;
    TorchShim::Marks& marks = marks_[hosted][facts.type];
    const Description& layout = facts.extent == ColumnFacts::ELEMENTS ? row.layout
                                : facts.extent == ColumnFacts::ONE    ? scalar
                                                                      : row.blocks;
    if (reader_.is_like(tensor, marks, layout)) {
        *address = reader_.data(tensor);
    } else {
        Description described;
        if (!reader_.describe(tensor, described) || !fits(described, column, row) || reader_.is_negated(tensor)) {
            return false;
        }
        *address = described.data;
        marks = reader_.marks(tensor);
    }
    row.tensor[column] = tensor;
    // Mostly, and then no more is asked.
    if (*address == rows_[i].column[column] && *address != nullptr) return true;
    const int64_t elements = facts.extent == ColumnFacts::ELEMENTS ? rows_[i].numel
                             : facts.extent == ColumnFacts::ONE    ? 1
                                                                   : row.blocks.shape[0];
    if (elements == 0) return true;
    return *address != nullptr && reader_.holds(tensor, elements, column_dtype_[column].bits / 8) &&
           (!hosted || hold(tensor, column, i));
}

// Whether a device may use a tensor's host memory, which is asked where its address is new, and held from then on.
bool TableBinding::hold(PyObject* tensor, int column, size_t i) {
    auto memory = py::reinterpret_steal<py::object>(PyObject_CallFunctionObjArgs(hold_.ptr(), tensor, nullptr));
    if (!memory) throw py::error_already_set();
    if (memory.is_none()) return false;
    pinned_[i * COLUMNS + column] = std::move(memory);
    return true;
}

bool TableBinding::refresh(py::dict state, Pass pass, bool event_later) {
    release();
    pass_ = pass;
    event_later_ = event_later;
    shared_.clear();
    if (!groups_.refresh(reader_, device_)) return false;
    for (size_t i = 0; i < rows_.size(); ++i) {
        if (!refresh_row(i, state.ptr())) {
            release();
            return false;
        }
    }
    return true;
}

bool TableBinding::refresh_row(size_t i, PyObject* state) {
    Tensors& row = tensors_[i];
    void* address;
    PyObject* const param = row.copy != nullptr ? row.copy : shards_.local(row.owner);
    // Where the parameter itself is elsewhere, it may by now share memory with another one: that is Python's to ask.
    if (param == nullptr || !find(param, PARAM, i, &address) || address != rows_[i].column[PARAM]) return false;
    if (pass_ == Pass::SYNC) {
        rows_[i].column[GRAD] = row.owner;
    } else if (!refresh_gradient(i)) {
        return false;
    }
    const bool active = rows_[i].column[GRAD] != nullptr;
    if (active != row.updated) updated_ = py::object();
    row.updated = active;
    return !active || refresh_state(i, state);
}

bool TableBinding::refresh_state(size_t i, PyObject* state) {
    Tensors& row = tensors_[i];
    PyObject* entries;
    if (!find_place(row, state, &entries)) return false;
    for (uint32_t left = in_pass(row); left != 0; left &= left - 1) {
        const int column = __builtin_ctz(left);
        PyObject* value;
        if (!find_entry(row, column, entries, &value)) return false;
        PyObject* const tensor = shards_.local(value);
        void* address;
        if (tensor == nullptr || !find(tensor, column, i, &address)) return false;
        // A number that is none: Python says so.
        if (COLUMN_FACTS[column].extent == ColumnFacts::ONE && on_host_ && !is_count(*static_cast<double*>(address)))
            return false;
        if (address != rows_[i].column[column]) {
            rows_[i].column[column] = address;
            ++moves_;
        }
        if (Py_REFCNT(value) > 1) shared_.push_back(value);
    }
    return true;
}

bool TableBinding::find_place(Tensors& row, PyObject* state, PyObject** entries) const {
    PyObject* key = nullptr;
    Py_ssize_t position = row.place;
    if (!PyDict_Next(state, &position, &key, entries) || key != row.owner) {
        for (position = 0;;) {
            row.place = position;
            if (!PyDict_Next(state, &position, &key, entries)) return false;
            if (key == row.owner) break;
        }
    }
    return PyDict_Check(*entries);
}

bool TableBinding::find_entry(Tensors& row, int column, PyObject* entries, PyObject** value) const {
    PyObject* key = nullptr;
    PyObject* const name = PyTuple_GET_ITEM(entries_.ptr(), column);
    Py_ssize_t position = row.entry[column];
    if (!PyDict_Next(entries, &position, &key, value) || !same_name(key, name)) {
        for (position = 0;;) {
            row.entry[column] = static_cast<int32_t>(position);
            if (!PyDict_Next(entries, &position, &key, value)) return false;
            if (same_name(key, name)) break;
        }
    }
    return reader_.is_tensor(*value);
}

bool TableBinding::refresh_gradient(size_t i) {
    Tensors& row = tensors_[i];
    PyObject* gradient;
    if (row.own_gradient) {
        gradient = PyObject_GetAttrString(row.owner, "grad");
        if (gradient == nullptr) throw py::error_already_set();
    } else {
        gradient = reader_.gradient(row.owner);
    }
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
    void* address;
    PyObject* const lies = local_gradient(i, gradient);
    if (lies != nullptr && find(lies, GRAD, i, &address)) {
        Py_INCREF(lies);
        Py_DECREF(gradient);
        gradients_[i] = lies;
    } else {
        // Python says what is wrong with it, or gives a copy in the parameter's layout; None asks for another table.
        py::object conformed = py::reinterpret_steal<py::object>(PyObject_CallFunctionObjArgs(
            conform_.ptr(), row.owner, row.copy == nullptr ? Py_None : row.copy, gradient, nullptr));
        if (!conformed) throw py::error_already_set();
        if (conformed.is_none()) return false;
        Py_DECREF(gradients_[i]);
        gradients_[i] = conformed.release().ptr();
        if (!find(gradients_[i], GRAD, i, &address)) {
            throw py::value_error("a gradient could not be brought into its parameter's layout");
        }
    }
    // An empty tensor has no address, and yet takes the step.
    rows_[i].column[GRAD] = rows_[i].numel == 0 ? static_cast<void*>(gradients_[i]) : address;
    return true;
}

void TableBinding::release() {
    for (auto& gradient : gradients_) Py_CLEAR(gradient);
}

py::list TableBinding::updated() {
    if (!updated_) {
        py::list active;
        for (const Tensors& row : tensors_) {
            if (row.updated && row.version != nullptr) active.append(py::handle(row.version));
        }
        updated_ = std::move(active);
    }
    if (shared_.empty()) return updated_;
    auto all = py::reinterpret_steal<py::list>(PyList_GetSlice(updated_.ptr(), 0, PyList_GET_SIZE(updated_.ptr())));
    if (!all) throw py::error_already_set();
    for (PyObject* const state : shared_) all.append(py::handle(state));
    return all;
}

py::list TableBinding::pinned() const {
    py::list all;
    for (const auto& [place, memory] : pinned_) all.append(memory);
    return all;
}

std::pair<py::list, py::list> TableBinding::tensors() const {
    py::list owners, state;
    for (const Tensors& row : tensors_) {
        if (!row.updated) continue;
        owners.append(py::handle(row.owner));
        for (uint32_t left = in_pass(row); left != 0; left &= left - 1) {
            state.append(py::handle(row.tensor[__builtin_ctz(left)]));
        }
    }
    return {owners, state};
}

Table TableBinding::view() const {
    const auto count = [](const auto& of) { return static_cast<int64_t>(of.size()); };
    const std::vector<Group>& groups = groups_.groups();
    return {policy_, rows_.data(), count(rows_), groups.data(), count(groups), chunks_.data(), count(chunks_)};
}

int TableBinding::traverse(visitproc visit, void* argument) const {
    const int result = groups_.traverse(visit, argument);
    return result != 0
               ? result
               : visit_all({entries_.ptr(), conform_.ptr(), hold_.ptr(), held_.ptr(), updated_.ptr()}, visit, argument);
}

void TableBinding::clear() {
    release();
    rows_.clear();
    tensors_.clear();
    alike_.clear();
    gradients_.clear();
    chunks_.clear();
    groups_.clear();
    shared_.clear();
    updated_ = py::object();
    held_ = py::list();
    pinned_.clear();
    conform_ = py::object();
    hold_ = py::object();
    entries_ = py::tuple();
}

}  // namespace lookahead_fused
