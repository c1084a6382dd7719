// The launch of a kernel, and nothing else.
#pragma once

#include "runtime.h"

namespace lookahead_fused {
inline namespace LF_ISA {

template <class... Arguments>
cudaError_t launch(void (*kernel)(Arguments...), unsigned blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace LF_ISA
}  // namespace lookahead_fused
