// A stand-in for the CUDA runtime, as far as csrc/cuda uses it: the same sources, compiled by the C++ compiler, run on
// host memory. Every thread of every block runs in turn, as a fiber that a barrier suspends; copies and launches are
// queued on their stream, recorded where it is being captured, and can be made to fail or to be late.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after the other.
#define __shared__ static

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaUserObjectNoDestructorSync = 1;
constexpr unsigned cudaGraphUserObjectMove = 1;

typedef struct StandInStream* cudaStream_t;
typedef struct StandInEvent* cudaEvent_t;
typedef struct StandInGraph* cudaGraph_t;
typedef struct StandInUserObject* cudaUserObject_t;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    void* attrs = nullptr;
    unsigned numAttrs = 0;
};

const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, void (*release)(void*), unsigned count,
                                 unsigned flags);
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count);
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags);

void __syncthreads();
void __syncwarp();
// csrc/cuda/runtime.h tells what for.
uint2 from_neighbour(uint2 given);
uint32_t from_first_lane(uint32_t given);
uint32_t largest_in_warp(uint32_t own);
bool any_in_warp(bool own);

namespace stand_in {
cudaError_t load_kernel();
cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> thread);
// Notes an access to global memory; one that the hardware would refuse makes the launch fail.
void access(const void* address, size_t bytes, bool write);
}  // namespace stand_in

template <class... Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Arguments...)) {
    return stand_in::load_kernel();
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    // Copied now, as kernel arguments are.
    auto held = std::tuple<Parameters...>(std::forward<Arguments>(arguments)...);
    return stand_in::launch(*config, [kernel, held] { std::apply(kernel, held); });
}

template <class Word>
Word load_global(const Word* address) {
    stand_in::access(address, sizeof(Word), false);
    Word word;
    std::memcpy(&word, static_cast<const void*>(address), sizeof(word));
    return word;
}

template <class Word>
void store_global(Word* address, Word word) {
    stand_in::access(address, sizeof(Word), true);
    std::memcpy(static_cast<void*>(address), &word, sizeof(word));
}

template <class Word>
Word __ldcg(const Word* address) {
    return load_global(address);
}

// Threads run one after the other.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    stand_in::access(address, sizeof(*address), true);
    const unsigned before = *address;
    *address = before + value;
    return before;
}

template <class Word>
Word __ldcs(const Word* address) {
    return load_global(address);
}

template <class Word>
void __stcs(Word* address, Word word) {
    store_global(address, word);
}

// What the conversion instructions give, but for a NaN's sign and payload.
inline float half_bits_to_float(uint16_t half) {
    const int exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
    const float magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                            : std::ldexp(static_cast<float>(fraction | 0x400), exponent - 25);
    return half & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t float_to_bfloat16_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return static_cast<uint16_t>(std::isnan(value) ? 0x7fffu : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline uint16_t float_to_half_bits(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return 0x7fff;
    if (magnitude == 0) return sign;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    // In units of the half's last place, which is 2^-24 for the smallest; nearbyint rounds ties to even.
    int exponent;
    std::frexp(magnitude, &exponent);
    const int unit = exponent - 11 > -24 ? exponent - 11 : -24;
    const auto count = static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, -unit)));
    // The leading bit of a normal half's count is one step of its exponent; rounding up may carry into the next.
    return sign | static_cast<uint16_t>(((unit + 24) << 10) + count);
}
