# Refuses an nvcc that cannot compile csrc/cuda, by name and not by what it would make of the sources. 12.0 is the first
# whose runtime tells by cudaStreamGetCaptureInfo which graph a stream is captured into.
set(oldest_nvcc 12.0)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS oldest_nvcc)
  message(FATAL_ERROR "lookahead_fused._cuda needs nvcc ${oldest_nvcc} or later, and ${CMAKE_CUDA_COMPILER} is "
                      "${CMAKE_CUDA_COMPILER_VERSION}: name another toolkit by CUDA_HOME, or build without it by "
                      "LOOKAHEAD_FUSED_CUDA=0.")
endif()
