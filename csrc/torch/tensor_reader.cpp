#include "tensor_reader.h"

#include <array>
#include <cstring>

namespace lookahead_fused {

int64_t Description::numel() const {
    int64_t count = 1;
    for (int32_t i = 0; i < ndim; ++i) count *= shape[i];
    return count;
}

bool Description::has_odd_stride() const {
    for (int32_t i = 0; i < ndim; ++i) {
        if (strides[i] % 2 != 0) return true;
    }
    return false;
}

bool Description::same_device(const Description& other) const {
    return device.type == other.device.type && device.id == other.device.id;
}

bool Description::on_host() const {
    return device.type == dlpack::CPU || device.type == dlpack::CUDA_HOST || device.type == dlpack::ROCM_HOST;
}

bool Description::same_layout(const Description& other) const {
    if (ndim != other.ndim) return false;
    for (int32_t i = 0; i < ndim; ++i) {
        if (shape[i] != other.shape[i]) return false;
        if (strides[i] != other.strides[i] && shape[i] > 1) return false;
    }
    return true;
}

namespace {

template <class Type>
constexpr dlpack::DataType dlpack_type() {
    const auto code = std::is_same_v<Type, LowHalf>    ? dlpack::INT
                      : std::is_same_v<Type, Code>     ? dlpack::UINT
                      : std::is_same_v<Type, BFloat16> ? dlpack::BFLOAT
                                                       : dlpack::FLOAT;
    return {code, 8 * sizeof(Type), 1};
}

struct NamedDtype {
    const char* name;
    Dtype dtype;
    dlpack::DataType dlpack;
};

template <class... Types>
constexpr std::array<NamedDtype, sizeof...(Types)> named(List<DtypeOf<Types>...>) {
    return {{{DtypeOf<Types>::name, DtypeOf<Types>::value, dlpack_type<Types>()}...}};
}

constexpr auto DTYPES = named(ColumnDtypes{});

std::vector<int64_t> integers(py::handle sequence) {
    std::vector<int64_t> values;
    for (const py::handle item : sequence) values.push_back(item.cast<int64_t>());
    return values;
}

bool says_otherwise(PyTypeObject* type, const char* attribute, const py::object& inherited, py::object& last_not) {
    const py::handle object(reinterpret_cast<PyObject*>(type));
    if (object.is(last_not)) return false;
    if (!py::object(object.attr(attribute)).is(inherited)) return true;
    last_not = py::reinterpret_borrow<py::object>(object);
    return false;
}

}  // namespace

Dtype dtype_named(const std::string& name) {
    for (const auto& entry : DTYPES) {
        if (name == entry.name) return entry.dtype;
    }
    throw py::value_error("no row has a tensor of dtype '" + name + "'");
}

dlpack::DataType dlpack_dtype(Dtype dtype) {
    for (const auto& entry : DTYPES) {
        if (dtype == entry.dtype) return entry.dlpack;
    }
    throw py::value_error("unknown dtype number " + std::to_string(static_cast<int>(dtype)));
}

TensorReader::TensorReader(py::handle tensor_type, Way fastest) : fastest_(fastest) {
    if (!PyType_Check(tensor_type.ptr())) throw py::type_error("tensor_type must be torch.Tensor");
    tensor_type_ = reinterpret_cast<PyTypeObject*>(tensor_type.ptr());

    if (fastest <= Way::EXCHANGE_API && py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) {
        const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
        void* pointer = PyCapsule_GetPointer(capsule.ptr(), dlpack::CAPSULE_NAME);
        if (pointer == nullptr) throw py::error_already_set();
        const auto* api = static_cast<const dlpack::ExchangeApi*>(pointer);
        // A later major version may have moved what is read here; the older tables hang behind it.
        while (api != nullptr && api->version.major != 1) api = api->previous;
        if (api != nullptr && api->describe != nullptr) api_ = api;
    }

    // The descriptor's own function: a look-up along the classes of each parameter costs as much as the call.
    gradient_descriptor_ = tensor_type.attr("grad");
    const py::object& descriptor = gradient_descriptor_;
    if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type)) {
        throw py::type_error("torch.Tensor.grad is not a getset descriptor in this torch");
    }
    const auto* getset = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
    gradient_ = getset->get;
    gradient_closure_ = getset->closure;

    dispatch_ = tensor_type.attr("__torch_dispatch__");

    const py::object method = tensor_type.attr("is_neg");
    if (!Py_IS_TYPE(method.ptr(), &PyMethodDescr_Type)) {
        throw py::type_error("torch.Tensor.is_neg is not a method descriptor in this torch");
    }
    const auto* definition = reinterpret_cast<PyMethodDescrObject*>(method.ptr())->d_method;
    if (definition->ml_flags != METH_NOARGS) throw py::type_error("torch.Tensor.is_neg takes arguments in this torch");
    is_negated_ = definition->ml_meth;
}

TensorReader::Way TensorReader::way() const {
    return !known_.empty() ? Way::SHIM : api_ != nullptr ? Way::EXCHANGE_API : Way::ATTRIBUTES;
}

bool TensorReader::describe_first(PyObject* tensor, Description& out) {
    if (api_ == nullptr) {
        if (!describe_by_attributes(tensor, out)) return false;
    } else {
        dlpack::Tensor described;
        if (api_->describe(tensor, &described) != 0) {
            PyErr_Clear();
            return false;
        }
        out.data = static_cast<char*>(described.data) + described.byte_offset;
        out.device = described.device;
        out.dtype = described.dtype;
        out.ndim = described.ndim;
        out.shape = described.shape;
        out.strides = described.strides;
    }
    if (fastest_ == Way::SHIM) learn(tensor, out);
    return true;
}

void TensorReader::learn(PyObject* tensor, const Description& described) {
    Known known{Py_TYPE(tensor), {}, described.device, described.dtype};
    TorchShim::Place place;
    shim_ = TorchShim::find(tensor);
    if (shim_ == nullptr || !shim_->kind(tensor, known.kind) || !shim_->place(tensor, place)) return;
    Description same = described;
    same.data = place.data;
    same.ndim = static_cast<int32_t>(place.ndim);
    same.shape = place.shape;
    same.strides = place.strides;
    if (same.data == described.data && same.same_layout(described)) known_.push_back(known);
}

PyObject* TensorReader::gradient(PyObject* tensor) const {
    PyObject* gradient = gradient_(tensor, gradient_closure_);
    if (gradient == nullptr) throw py::error_already_set();
    return gradient;
}

bool TensorReader::has_own_dispatch(PyTypeObject* type) const {
    if (around_type_.ptr() == reinterpret_cast<PyObject*>(type)) return true;
    if (!says_otherwise(type, "__torch_dispatch__", dispatch_, plain_type_)) return false;
    around_type_ = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(type));
    return true;
}

bool TensorReader::has_own_gradient(PyTypeObject* type) const {
    return type != tensor_type_ && says_otherwise(type, "grad", gradient_descriptor_, usual_gradient_type_);
}

bool TensorReader::is_negated(PyObject* tensor) const {
    PyObject* answer = is_negated_(tensor, nullptr);
    if (answer == nullptr) throw py::error_already_set();
    Py_DECREF(answer);
    return answer == Py_True;
}

bool TensorReader::describe_by_attributes(PyObject* object, Description& out) {
    const py::handle tensor(object);
    if (py::str(tensor.attr("layout")).cast<std::string>() != "torch.strided") return false;
    const std::string dtype = py::str(tensor.attr("dtype")).cast<std::string>();
    out.dtype = {};
    for (const auto& entry : DTYPES) {
        if (dtype == std::string("torch.") + entry.name) out.dtype = entry.dlpack;
    }
    out.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    const std::string type = tensor.attr("device").attr("type").cast<std::string>();
    const py::object index = tensor.attr("device").attr("index");
    // DLPack's numbers; what a device of another type is called does not matter as long as it is not one of these.
    out.device.type = type == "cpu" ? 1 : type == "cuda" ? 2 : 12;
    out.device.id = index.is_none() ? 0 : index.cast<int32_t>();
    shape_ = integers(tensor.attr("shape"));
    strides_ = integers(tensor.attr("stride")());
    out.ndim = static_cast<int32_t>(shape_.size());
    out.shape = shape_.data();
    out.strides = strides_.data();
    return true;
}

// DLPack tells nothing of the storage.
bool TensorReader::holds_by_attributes(PyObject* object, int64_t elements, int64_t element_bytes) const {
    const py::handle tensor(object);
    const auto bytes = tensor.attr("untyped_storage")().attr("nbytes")().cast<int64_t>();
    return bytes / element_bytes - tensor.attr("storage_offset")().cast<int64_t>() >= elements;
}

}  // namespace lookahead_fused
