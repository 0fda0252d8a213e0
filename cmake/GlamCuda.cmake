# Finds what the CUDA kernels need and compiles them into a target, or says why there are none.
#
# GLAM_CUDA: AUTO (the default: built where torch has CUDA and a toolkit is found), ON (an error where not) or OFF.
# GLAM_CUDA_ARCHITECTURES: CMake's names of the architectures to compile for.
# glam_find_cuda() sets GLAM_CUDA_FOUND, GLAM_CUDA_REASON (empty where found) and GLAM_CUDA_NAMES (8.0,9.0a,...).

set(GLAM_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
set(GLAM_CUDA_ARCHITECTURES "80-real;90a-real;100-real;100-virtual" CACHE STRING "GPU architectures")

# Spilled registers and local memory are errors: a kernel that needs them is mended, not shipped.
set(GLAM_NVCC_OPTIONS --expt-relaxed-constexpr -Xptxas=-warn-spills,-warn-lmem-usage -Werror=all-warnings
    -Xcompiler=-Wall,-Wextra,-Wno-unused-parameter)

function(glam_find_cuda)
  set(reason "")
  if(GLAM_CUDA STREQUAL "OFF")
    set(reason "switched off by GLAM_CUDA=OFF")
  elseif(NOT EXISTS ${GLAM_TORCH_DIR}/lib/libtorch_cuda.so)
    set(reason "torch ${GLAM_TORCH_FULL_VERSION} has no CUDA")
  else()
    if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND DEFINED ENV{CUDA_HOME})
      set(CMAKE_CUDA_COMPILER $ENV{CUDA_HOME}/bin/nvcc)
    endif()
    include(CheckLanguage)
    check_language(CUDA)
    if(NOT CMAKE_CUDA_COMPILER)
      set(reason "no CUDA compiler was found; install a CUDA toolkit and set CUDA_HOME to its folder")
    endif()
  endif()
  if(reason AND GLAM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "glam: expected to build the CUDA kernels (GLAM_CUDA=ON), but ${reason}")
  endif()
  string(REGEX MATCHALL "[0-9]+a?-real" architectures "${GLAM_CUDA_ARCHITECTURES}")
  list(TRANSFORM architectures REPLACE "([0-9])(a?)-real" ".\\1\\2")
  list(JOIN architectures "," architectures)
  set(GLAM_CUDA_REASON "${reason}" PARENT_SCOPE)
  set(GLAM_CUDA_NAMES "${architectures}" PARENT_SCOPE)
  set(CMAKE_CUDA_COMPILER ${CMAKE_CUDA_COMPILER} PARENT_SCOPE)
  if(reason)
    set(GLAM_CUDA_FOUND OFF PARENT_SCOPE)
  else()
    set(GLAM_CUDA_FOUND ON PARENT_SCOPE)
  endif()
endfunction()

# A macro: enable_language must run in the caller's scope.
macro(glam_enable_cuda)
  set(CMAKE_CUDA_ARCHITECTURES ${GLAM_CUDA_ARCHITECTURES})
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  if(CMAKE_CXX_COMPILER_LAUNCHER)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
endmacro()

# The kernels see no torch header: an object library of their own, then the glue in the target itself.
function(glam_add_cuda target)
  file(GLOB kernels CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/kernels/*.cu)
  file(GLOB glue CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cpp)
  add_library(glam_cuda_kernels OBJECT ${kernels})
  target_include_directories(glam_cuda_kernels PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/csrc)
  target_compile_options(glam_cuda_kernels PRIVATE ${GLAM_NVCC_OPTIONS})
  set_target_properties(glam_cuda_kernels PROPERTIES CUDA_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
  target_sources(${target} PRIVATE ${glue} $<TARGET_OBJECTS:glam_cuda_kernels>)
  target_link_libraries(${target} PRIVATE ${GLAM_TORCH_DIR}/lib/libtorch_cuda.so ${GLAM_TORCH_DIR}/lib/libc10_cuda.so
                        CUDA::cudart)
endfunction()
