// The global gradient norm, the non-finite flag and clipping.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "glam/ops.h"
#include "glam/optim.h"

namespace glam::optim {

GradientStatistics gradient_statistics(at::TensorList parameters) {
  TORCH_CHECK(!parameters.empty(), "glam::optim::gradient_statistics: expected at least one parameter, got none");
  const at::NoGradGuard no_grad;
  const auto options = parameters[0].options().requires_grad(false);
  at::Tensor squares = at::zeros({}, options.dtype(at::kDouble)), nonfinite = at::zeros({}, options.dtype(at::kBool));
  for (const at::Tensor& parameter : parameters) {
    if (!parameter.grad().defined()) continue;
    const auto [sum, bad] = squared_norm(parameter.grad());
    squares = squares + sum;
    nonfinite = nonfinite.logical_or(bad);
  }
  return {squares.sqrt(), nonfinite};
}

void clip_gradients_(at::TensorList parameters, const at::Tensor& norm, double max_norm) {
  TORCH_CHECK(max_norm > 0, "glam::optim::clip_gradients_: expected max_norm > 0, got ", max_norm);
  const at::NoGradGuard no_grad;
  const at::Tensor factor = norm.reciprocal().mul(max_norm).clamp_max(1.);
  for (const at::Tensor& parameter : parameters) {
    at::Tensor grad = parameter.grad();
    if (grad.defined()) grad.mul_(factor.to(grad.scalar_type()));
  }
}

}  // namespace glam::optim
