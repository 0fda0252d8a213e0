# Finds an installed torch (a Python package or a LibTorch folder) and makes the target glam::torch of it: headers,
# libtorch, libtorch_cpu and libc10. Used by our own build and, installed beside glamConfig.cmake, by programs.
#
# Not find_package(Torch): with a CUDA build of torch that demands a whole CUDA toolkit, which the CPU side has no use for.
#
# Looked for in this order: the variable GLAM_TORCH_DIR, the places find_package(Torch) knows (Torch_DIR, CMAKE_PREFIX_PATH),
# the package torch beside the installed package glam_ext, and the one the package was compiled against.
# Sets GLAM_TORCH_DIR, GLAM_TORCH_VERSION (2.13.0) and GLAM_TORCH_FULL_VERSION (2.13.0+cpu).

if(TARGET glam::torch)
  return()
endif()

set(_glam_candidates ${GLAM_TORCH_DIR})
foreach(_glam_dir IN LISTS Torch_DIR)
  list(APPEND _glam_candidates "${_glam_dir}/../../..")
endforeach()
set(_glam_prefixes ${CMAKE_PREFIX_PATH} $ENV{CMAKE_PREFIX_PATH})
string(REPLACE ":" ";" _glam_prefixes "${_glam_prefixes}")
foreach(_glam_dir IN LISTS _glam_prefixes)
  list(APPEND _glam_candidates "${_glam_dir}" "${_glam_dir}/../..")  # LibTorch's own folder; torch.utils.cmake_prefix_path
endforeach()
list(APPEND _glam_candidates "${CMAKE_CURRENT_LIST_DIR}/../../../../torch" ${GLAM_TORCH_HINT})

set(_glam_found "")
foreach(_glam_dir IN LISTS _glam_candidates)
  if(NOT _glam_found AND EXISTS "${_glam_dir}/share/cmake/Torch/TorchConfig.cmake")
    get_filename_component(_glam_found "${_glam_dir}" REALPATH)
  endif()
endforeach()
if(NOT _glam_found)
  message(FATAL_ERROR "glam: expected an installed torch, found none; pass "
          "-DCMAKE_PREFIX_PATH=\"$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')\" or the folder of LibTorch")
endif()
set(GLAM_TORCH_DIR ${_glam_found} CACHE PATH "The torch package or LibTorch folder" FORCE)

file(READ ${GLAM_TORCH_DIR}/include/torch/headeronly/version.h _glam_text)
string(REGEX REPLACE ".*define TORCH_VERSION_MAJOR ([0-9]+).*define TORCH_VERSION_MINOR ([0-9]+).*define TORCH_VERSION_PATCH ([0-9]+).*"
       "\\1.\\2.\\3" GLAM_TORCH_VERSION "${_glam_text}")
set(GLAM_TORCH_FULL_VERSION ${GLAM_TORCH_VERSION})
if(EXISTS ${GLAM_TORCH_DIR}/version.py)
  file(STRINGS ${GLAM_TORCH_DIR}/version.py _glam_lines REGEX "^__version__ = ")
  string(REGEX REPLACE ".*'(.*)'.*" "\\1" GLAM_TORCH_FULL_VERSION "${_glam_lines}")
elseif(EXISTS ${GLAM_TORCH_DIR}/build-version)
  file(STRINGS ${GLAM_TORCH_DIR}/build-version GLAM_TORCH_FULL_VERSION)
endif()

add_library(glam::torch INTERFACE IMPORTED)
target_include_directories(glam::torch INTERFACE
    ${GLAM_TORCH_DIR}/include ${GLAM_TORCH_DIR}/include/torch/csrc/api/include)
# As torch itself is compiled; some headers of torch.distributed depend on them.
target_compile_definitions(glam::torch INTERFACE USE_DISTRIBUTED USE_C10D_GLOO)
target_compile_features(glam::torch INTERFACE cxx_std_20)
foreach(_glam_library torch torch_cpu c10)
  target_link_libraries(glam::torch INTERFACE ${GLAM_TORCH_DIR}/lib/lib${_glam_library}.so)
endforeach()
