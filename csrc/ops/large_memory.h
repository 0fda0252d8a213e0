// Memory for large tensors, in huge pages: reading small ones takes up to 1.6 times as long.
//
// Of tensors that every step makes anew (gradients of expert weights, activations), a pool. Fresh pages cost more than the
// arithmetic whose results fill them: the system zeroes them one by one, and gathers huge ones first. So a block that is
// freed is kept for the next tensor of about its size. What is kept and in use together is at most five quarters of what
// was once in use at the same time. Blocks beyond, up to three halves, and those that were long not used, are kept too but
// offered to the system, which may take their pages whenever it needs memory (MADV_FREE).
#pragma once

#include <ATen/core/Tensor.h>

namespace glam {

// An uninitialised contiguous tensor; at::empty where it is small or not on the CPU.
at::Tensor empty_large(at::IntArrayRef sizes, const at::TensorOptions& options);
// The same for a tensor that stays, a parameter: not of the pool.
at::Tensor empty_lasting(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace glam
