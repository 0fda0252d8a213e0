# Compiler options that are the same for every target of the project.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# The glue does not gain from -O3; the kernels ask for it themselves.
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG")
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

# For `make sanitize`: every error of these kinds ends the program.
option(GLAM_SANITIZE "Build with the address and undefined behaviour sanitizers" OFF)
if(GLAM_SANITIZE)
  # vptr needs the type information of torch's classes, which torch hides.
  add_compile_options(-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr
                      -fno-sanitize-recover=undefined)
  add_link_options(-fsanitize=address,undefined)
endif()

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()

# Warnings for our own sources; torch's headers come in as system headers and stay silent.
function(glam_own_sources target)
  target_compile_options(${target} PRIVATE -Wall -Wextra)
endfunction()

# Reading torch's headers is half of what the glue takes to compile, so they are read once. A cache of objects looks into
# every header anyway and does without.
function(glam_precompile_torch target)
  if(NOT CMAKE_CXX_COMPILER_LAUNCHER)
    target_precompile_headers(${target} PRIVATE
        <ATen/Parallel.h> <ATen/core/LegacyTypeDispatch.h> <ATen/core/Tensor.h> <ATen/core/dispatch/Dispatcher.h>
        <ATen/ops/empty.h> <torch/csrc/autograd/custom_function.h> <torch/library.h>)
  endif()
endfunction()
