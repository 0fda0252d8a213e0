// The name of a kernel from its address, for messages and reports.
#pragma once

#include <string>

namespace glam::cuda::emulator {

// As in the source, with template arguments and without namespaces and parameters: "row_kernel<float, 4>". From the
// symbol table of the file that holds it; "a kernel" where that has been stripped.
const std::string& kernel_name(const void* kernel);

}  // namespace glam::cuda::emulator
