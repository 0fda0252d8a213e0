// Memory for large tensors that every step makes anew: gradients of expert weights, activations.
//
// Fresh pages cost more than the arithmetic whose results fill them: the system zeroes them one by one, and gathers huge
// ones first. So a block that is freed is kept for the next tensor of about its size. The system may take its pages back
// whenever it needs memory (MADV_FREE), and what is kept and in use together is never more than five quarters of what
// was once in use at the same time.
#pragma once

#include <ATen/core/Tensor.h>

namespace glam {

// An uninitialised contiguous tensor; at::empty where it is small or not on the CPU.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace glam
