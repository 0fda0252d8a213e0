# Embeds the model's wiring: the text of glam_ext/functional.py between "# --- begin" and "# --- end" becomes the C++ string
# glam::kFunctionalSource (header export/functional_source.h), so that Python and the TorchScript archive share one text.

function(glam_embed_functional_source target)
  set(generator ${CMAKE_CURRENT_SOURCE_DIR}/cmake/embed_functional_source.cmake)
  set(generated ${CMAKE_CURRENT_BINARY_DIR}/functional_source.cpp)
  file(GLOB source CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/glam_ext/functional.py)
  add_custom_command(
      OUTPUT ${generated}
      COMMAND ${CMAKE_COMMAND} -DINPUT=${source} -DOUTPUT=${generated} -P ${generator}
      DEPENDS ${source} ${generator}
      COMMENT "Embedding glam_ext/functional.py")
  target_sources(${target} PRIVATE ${generated})
endfunction()
