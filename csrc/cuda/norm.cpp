// CUDA kernels of glam::rms_norm.

#include "cuda/kernels/norm.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include "cuda/common.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

// The scale in the accumulation type, contiguous.
Tensor accumulation_copy(const Tensor& scale, at::ScalarType x_dtype) {
  return scale.to(accumulation_dtype(x_dtype)).contiguous();
}

Tensor forward(const Tensor& x_, const Tensor& scale_, double eps) {
  checks::rms_norm(x_, scale_);
  const OnDevice device(x_);
  const Tensor x = x_.contiguous(), y = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return y;
  const Tensor scale = accumulation_copy(scale_, x.scalar_type());
  const int64_t D = x.size(-1);
  rms_norm(data(x), type_of(x), data(scale), eps, x.numel() / D, D, mutable_data(y), device.stream());
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_, const Tensor& x_, const Tensor& scale_, double eps) {
  const OnDevice device(x_);
  const Tensor grad = grad_.contiguous(), x = x_.contiguous();
  const Tensor grad_x = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return {grad_x, at::zeros_like(scale_, scale_.options(), at::MemoryFormat::Contiguous)};
  const Tensor scale = accumulation_copy(scale_, x.scalar_type());
  const int64_t D = x.size(-1), rows = x.numel() / D;
  const Tensor grad_scale = at::empty({D}, scale.options());
  const Tensor partial = at::empty({rms_norm_blocks(rows), D}, scale.options());
  rms_norm_backward(data(grad), data(x), type_of(x), data(scale), eps, rows, D, mutable_data(grad_x),
                    mutable_data(partial), mutable_data(grad_scale), device.stream());
  return {grad_x, grad_scale.to(scale_.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("rms_norm", forward);
  m.impl("_rms_norm_backward", backward);
}

}  // namespace glam::cuda
