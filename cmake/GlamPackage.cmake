# Installs the CMake package (glam_ext/share/cmake/glam) and lib/build.json, from which Python learns, before it loads any
# library, which torch this copy was compiled against.

include(CMakePackageConfigHelpers)

string(REGEX REPLACE "^([0-9]+\\.[0-9]+).*" "\\1" GLAM_TORCH_MINOR ${GLAM_TORCH_VERSION})
set(GLAM_TORCH_HINT "")
if(GLAM_EXTRA_RPATH)  # used in place: torch is not beside the package
  set(GLAM_TORCH_HINT ${GLAM_TORCH_DIR})
endif()

configure_file(cmake/glamConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/glamConfig.cmake @ONLY)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/glamConfigVersion.cmake
    VERSION ${GLAM_VERSION} COMPATIBILITY SameMinorVersion)
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/build.json CONTENT [[
{"version": "@GLAM_VERSION@", "torch": "@GLAM_TORCH_FULL_VERSION@", "torch_minor": "@GLAM_TORCH_MINOR@"}
]] @ONLY)

install(FILES ${CMAKE_CURRENT_BINARY_DIR}/build.json DESTINATION glam_ext/lib)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/glamConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/glamConfigVersion.cmake
        ${CMAKE_CURRENT_SOURCE_DIR}/cmake/GlamTorch.cmake DESTINATION glam_ext/share/cmake/glam)
