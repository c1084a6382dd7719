// The calls around a launch: errors as exceptions, and what a scope changes and puts back.
#pragma once

#include <stdexcept>
#include <string>

#include "runtime.h"

namespace lookahead_fused {

inline void check(cudaError_t error, const std::string& call) {
    if (error == cudaSuccess) return;
    // Else the runtime reports it once more, to whoever asks next.
    cudaGetLastError();
    throw std::runtime_error(call + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// For callers without a guard of their own: to put a device back that had no context yet is to make one there.
class DeviceGuard {
   public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (device == previous_) return;
        check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int previous_ = 0;
    bool changed_ = false;
};

// While any stream is captured, calls that might wait are forbidden to every thread that does not ask for this.
class MayWait {
   public:
    MayWait() { exchanged_ = cudaThreadExchangeStreamCaptureMode(&mode_) == cudaSuccess; }
    ~MayWait() {
        if (exchanged_) cudaThreadExchangeStreamCaptureMode(&mode_);
    }
    MayWait(const MayWait&) = delete;
    MayWait& operator=(const MayWait&) = delete;

   private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
    bool exchanged_ = false;
};

}  // namespace lookahead_fused
