# The same bits on every machine: each operation is rounded once, none is contracted, reordered or approximated.
#
# Fast math breaks that silently, and the environment may ask for it in many places: CXX, CXXFLAGS, LDFLAGS, CUDAFLAGS,
# NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS, a script that CXX names. What can be undone is undone, by options that come
# last. Then the compilers are asked what they make of it all, since a list of names would never be complete: what is
# left is refused.

# ---- what undoes fast math -------------------------------------------------------------------------------------

set(exact_options
    -fno-fast-math # first: in GCC it puts back all that -ffast-math set, errno included
    -fno-unsafe-math-optimizations
    -fno-associative-math
    -fno-reciprocal-math
    -fno-finite-math-only
    -fsigned-zeros
    -ffp-contract=off
    -fno-math-errno) # lets sqrt be an instruction; changes no value
if(target_is_x86_64)
  list(APPEND exact_options -mfpmath=sse) # the older unit rounds to 64 bits, and again when it stores
endif()
# For nvcc's host compiler, which may be another one: it compiles launches alone, and they compute nothing.
set(exact_host_options ${exact_options})
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND exact_options -fno-single-precision-constant -fno-cx-limited-range)
else()
  include(CheckCXXCompilerFlag)
  foreach(option -fno-approx-func -fhonor-nans -fhonor-infinities -fdenormal-fp-math=ieee -ffp-eval-method=source)
    string(MAKE_C_IDENTIFIER "takes${option}" takes_it)
    check_cxx_compiler_flag(${option} ${takes_it})
    if(${takes_it})
      list(APPEND exact_options ${option})
    endif()
  endforeach()
endif()
set(exact_link_options -fno-fast-math -fno-unsafe-math-optimizations)

# ---- what is left of it ----------------------------------------------------------------------------------------

# Runs a compiler with the words of a string and then further ones; returns all that it prints.
function(answer_of compiler words result)
  separate_arguments(words UNIX_COMMAND "${words}")
  set(command ${compiler} ${words} ${ARGN})
  execute_process(COMMAND ${command} OUTPUT_VARIABLE printed ERROR_VARIABLE printed RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    list(JOIN command " " command)
    message(FATAL_ERROR "The compiler does not tell how it rounds. `${command}` printed: ${printed}")
  endif()
  set(${result} "${printed}" PARENT_SCOPE)
endfunction()

# Refuses what a C++ compiler's predefined macros tell of its rounding, if it is not as written.
function(refuse_inexact_macros macros variables)
  set(left "")
  foreach(macro_and_option
          "__FAST_MATH__ -ffast-math"
          "__ASSOCIATIVE_MATH__ -fassociative-math"
          "__RECIPROCAL_MATH__ -freciprocal-math"
          "__NO_SIGNED_ZEROS__ -fno-signed-zeros")
    string(REPLACE " " ";" macro_and_option "${macro_and_option}")
    list(GET macro_and_option 0 macro)
    list(GET macro_and_option 1 option)
    if(macros MATCHES "#define ${macro} ")
      string(APPEND left " ${option}")
    endif()
  endforeach()
  if(macros MATCHES "#define __FINITE_MATH_ONLY__ 1")
    string(APPEND left " -ffinite-math-only")
  endif()
  if(macros MATCHES "#define __FLT_EVAL_METHOD__ (-1|1|2)[^0-9]")
    string(APPEND left " a precision beyond the type's (-mfpmath=387 does)")
  endif()
  if(left)
    message(FATAL_ERROR "${variables} or the compiler's own configuration ask for${left}, which changes results and "
                        "cannot be undone: take it out.")
  endif()
endfunction()

# Refuses a C++ compiler that is to round otherwise still, or to link what makes the whole process do so.
function(refuse_inexact_cxx)
  string(TOUPPER "CMAKE_CXX_FLAGS_${CMAKE_BUILD_TYPE}" type_flags)
  set(flags "${CMAKE_CXX_COMPILER_ARG1} ${CMAKE_CXX_FLAGS} ${${type_flags}}")
  set(source "${CMAKE_BINARY_DIR}/empty.cpp")
  file(WRITE "${source}" "")
  answer_of("${CMAKE_CXX_COMPILER}" "${flags}" macros ${exact_options} -dM -E "${source}")
  refuse_inexact_macros("${macros}" "CXX, CXXFLAGS")

  string(APPEND flags " ${CMAKE_MODULE_LINKER_FLAGS}")
  # It links, for not every compiler (zig's) can tell the steps without taking them.
  set(linked "${CMAKE_BINARY_DIR}/empty${CMAKE_SHARED_MODULE_SUFFIX}")
  answer_of("${CMAKE_CXX_COMPILER}" "${flags}" steps ${exact_link_options} -shared -v "${source}" -o "${linked}")
  if(steps MATCHES "crtfastmath")
    string(REGEX MATCHALL "-Ofast|-ffast-math|-funsafe-math-optimizations|-mdaz-ftz" asked "${flags}")
    message(FATAL_ERROR "CXX, CXXFLAGS or LDFLAGS (${asked}) link crtfastmath.o, which changes how the whole process "
                        "rounds and cannot be undone: take it out.")
  endif()
endfunction()

# The same of nvcc. It has no option that undoes -use_fast_math, and what NVCC_APPEND_FLAGS holds comes after ours.
function(refuse_inexact_cuda options)
  set(variables "CUDAFLAGS, CUDAHOSTCXX, NVCC_PREPEND_FLAGS, NVCC_APPEND_FLAGS")
  string(REPLACE "SHELL:" "" options "${options}")
  list(JOIN options " " options)
  set(flags "${CMAKE_CUDA_FLAGS} -ccbin ${CMAKE_CUDA_HOST_COMPILER} ${options}")
  set(source "${CMAKE_BINARY_DIR}/empty.cu")
  file(WRITE "${source}" "")
  answer_of("${CMAKE_CUDA_COMPILER}" "${flags}" macros -E -Xcompiler -dM "${source}")
  refuse_inexact_macros("${macros}" "${variables}")

  answer_of("${CMAKE_CUDA_COMPILER}" "${flags}" steps --dryrun -c "${source}")
  string(REGEX MATCHALL " (-fast-math|-ftz=1|-prec_div=0|-prec_sqrt=0|-fmad=1)" left "${steps}")
  if(left)
    list(REMOVE_DUPLICATES left)
    message(FATAL_ERROR "${variables} or nvcc's own configuration make nvcc compile with${left}, which changes results "
                        "and cannot be undone: take -use_fast_math, -ftz, -prec-div, -prec-sqrt and -fmad out.")
  endif()
endfunction()
