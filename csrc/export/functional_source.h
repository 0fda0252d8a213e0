// The model's wiring as TorchScript source: the part of glam_ext/functional.py between its begin and end marks, embedded
// by the build (cmake/GlamFunctionalSource.cmake). Empty if the file is absent.
#pragma once

namespace glam {

extern const char* const kFunctionalSource;

}  // namespace glam
