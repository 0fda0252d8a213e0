// What the safetensors format calls things. Private to csrc/io: nothing installed includes it.
#pragma once

#include <c10/core/ScalarType.h>

namespace glam {

// "F32" for float32; nullptr for a dtype that the format, as we read it, does not have.
const char* safetensors_name(at::ScalarType dtype);

}  // namespace glam
