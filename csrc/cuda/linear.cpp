// CUDA kernels of glam::linear, linear_wide, router_logits and their gradients: the library's matrix product.
//
// Weights are rounded to x's dtype where they enter the product. The library picks its kernel by the shape, so a row's
// bits are those of the CPU only in exact arithmetic and may differ with the number of rows in the batch; for one shape
// they are the same on every run. Sums are float32 (float64 for float64) under torch's settings for the library: by
// default it may add partial sums of a long product in x's dtype
// (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction).

#include <ATen/ops/mm.h>

#include "cuda/common.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

// [M, K] of [..., K], which reshape cannot infer where K is 0.
Tensor as_matrix(const Tensor& x) {
  const int64_t K = x.size(-1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  return x.reshape({rows, K});
}

// [..., N] of a product [M, N], as x is [..., K].
Tensor in_batch_of(const Tensor& x, const Tensor& matrix) {
  auto sizes = x.sizes().vec();
  sizes.back() = matrix.size(1);
  return matrix.view(sizes);
}

// a b with the sums left in the accumulation type.
Tensor wide_product(const Tensor& a, const Tensor& b) {
  const auto dtype = accumulation_dtype(a.scalar_type());
  if (dtype == a.scalar_type()) return at::mm(a, b);
  if (a.is_cuda()) return at::mm(a, b, dtype);
  return at::mm(a.to(dtype), b.to(dtype));  // the library's mixed product knows GPUs alone
}

template <bool wide>
Tensor linear(const Tensor& x, const Tensor& weight) {
  checks::linear(x, weight);
  refuse_packed("glam::linear", "weight", "[D_in, D_out]", weight, 2);
  const OnDevice device(x);
  const Tensor x_MK = as_matrix(x), weight_KN = weight.to(x.scalar_type());
  return in_batch_of(x, wide ? wide_product(x_MK, weight_KN) : at::mm(x_MK, weight_KN));
}

// grad_weight[k, n] = sum over rows m of x[m, k] grad[m, n]
Tensor weight_gradient(const Tensor& x, const Tensor& grad, at::ScalarType dtype) {
  const OnDevice device(x);
  const Tensor x_KM = as_matrix(x).t(), grad_MN = as_matrix(grad);
  if (dtype == x.scalar_type()) return at::mm(x_KM, grad_MN);
  return wide_product(x_KM, grad_MN).to(dtype);
}

// The router's products are in float32 (float64), whatever x is.
Tensor router_logits(const Tensor& x, const Tensor& weight) {
  checks::router_logits(x, weight);
  const OnDevice device(x);
  const auto dtype = accumulation_dtype(x.scalar_type());
  return in_batch_of(x, at::mm(as_matrix(x).to(dtype), weight.to(dtype)));
}
Tensor router_input_gradient(const Tensor& grad, const Tensor& weight, at::ScalarType dtype) {
  const OnDevice device(grad);
  return in_batch_of(grad, at::mm(as_matrix(grad), weight.t().to(grad.scalar_type())).to(dtype));
}
Tensor router_weight_gradient(const Tensor& x, const Tensor& grad, at::ScalarType dtype) {
  const OnDevice device(x);
  return at::mm(as_matrix(x).t().to(grad.scalar_type()), as_matrix(grad)).to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("linear", linear<false>);
  m.impl("linear_wide", linear<true>);
  m.impl("_linear_weight_gradient", weight_gradient);
  m.impl("router_logits", router_logits);
  m.impl("_router_logits_input_gradient", router_input_gradient);
  m.impl("_router_logits_weight_gradient", router_weight_gradient);
}

}  // namespace glam::cuda
