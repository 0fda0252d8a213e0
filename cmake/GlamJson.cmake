# nlohmann/json: header only, from the PyPI package nlohmann-json of the building Python, else wherever CMake finds it.
# Used inside the core alone; no installed header includes it.

if(NOT GLAM_JSON_INCLUDE_DIR)
  find_package(Python COMPONENTS Interpreter QUIET)
  if(Python_EXECUTABLE)
    execute_process(
        COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('nlohmann_json').submodule_search_locations[0])"
        OUTPUT_VARIABLE json_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  find_path(GLAM_JSON_INCLUDE_DIR nlohmann/json.hpp HINTS "${json_package}/include")
endif()
if(NOT GLAM_JSON_INCLUDE_DIR)
  message(FATAL_ERROR "glam: expected the header nlohmann/json.hpp, found none; install it with `pip install nlohmann-json`")
endif()

add_library(glam_json INTERFACE)
target_include_directories(glam_json SYSTEM INTERFACE ${GLAM_JSON_INCLUDE_DIR})
