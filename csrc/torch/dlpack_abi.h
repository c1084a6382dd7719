// The part of DLPack's C ABI (version 1) that describes a tensor in place: the structs that a framework fills in, and
// the table of functions behind `__dlpack_c_exchange_api__`. Laid out as the DLPack specification fixes them; only what
// is read here is named.
#pragma once

#include <cstdint>

namespace lookahead_fused {
namespace dlpack {

struct Device {
    int32_t type;
    int32_t id;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

enum DeviceType : int32_t { CPU = 1, CUDA_HOST = 3, ROCM_HOST = 11 };

enum DataTypeCode : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct Version {
    uint32_t major;
    uint32_t minor;
};

struct ExchangeApi {
    Version version;
    ExchangeApi* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    // Describes a tensor without owning it and without synchronising; the pointers live as long as the tensor.
    int (*describe)(void* py_object, Tensor* out);
    int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

constexpr const char* CAPSULE_NAME = "dlpack_exchange_api";

}  // namespace dlpack
}  // namespace lookahead_fused
