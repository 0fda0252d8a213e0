// RMSNorm: y = x * rsqrt(mean(x^2) + eps) * scale over the last dimension; no mean is subtracted, no bias is added.
//
// x [..., D] gives y [..., D] in x's dtype; scale [D] is float32 or x's dtype and its gradient has its dtype. Everything
// between reading x and writing y is float32 (float64 for float64). A row of y depends on that row and on scale alone, to
// the bit. The backward recomputes the root from x.
// Source: Zhang and Sennrich (arXiv 1910.07467), with the direct scale (initially 1) of the public GLaM builders.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/checks.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::rms_norm";

const auto& norm_op() {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, double)>(kOp);
  return op;
}
const auto& backward_op() {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double);
  static const auto op = find_op<Signature>("glam::_rms_norm_backward");
  return op;
}

}  // namespace

void checks::rms_norm(const Tensor& x, const Tensor& scale) {
  check_floating(kOp, "x", x);
  TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to be [..., D] with at least 1 dimension, got a scalar");
  check_shape(kOp, "scale", scale, "[D]", {x.sym_size(-1)});
  check_weight_dtype(kOp, "scale", scale, x);
  check_same_device(kOp, scale, x);
}

namespace {

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, scale});
    ctx->saved_data["eps"] = eps;
    return norm_op().call(x, scale, eps);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto [grad_x, grad_scale] =
        backward_op().call(grads[0], saved[0], saved[1], ctx->saved_data["eps"].toDouble());
    return {ctx->needs_input_grad(0) ? grad_x : Tensor(), ctx->needs_input_grad(1) ? grad_scale : Tensor(), Tensor()};
  }
};

Tensor norm_autograd(const Tensor& x, const Tensor& scale, double eps) { return RmsNormFunction::apply(x, scale, eps); }

Tensor norm_meta(const Tensor& x, const Tensor& scale, double) {
  checks::rms_norm(x, scale);
  return at::empty_symint(x.sym_sizes(), x.options());
}

std::tuple<Tensor, Tensor> backward_meta(const Tensor&, const Tensor& x, const Tensor& scale, double) {
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint(scale.sym_sizes(), scale.options())};
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& scale, double eps) { return norm_op().call(x, scale, eps); }

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def("rms_norm(Tensor x, Tensor scale, float eps=1e-6) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_rms_norm_backward(Tensor grad, Tensor x, Tensor scale, float eps) -> (Tensor x, Tensor scale)",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("rms_norm", norm_autograd);
  m.impl("_rms_norm_backward", refuse_double_backward());
}
// No autocast kernel: the op takes x in whatever dtype it has and computes in float32 itself.
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("rms_norm", norm_meta);
  m.impl("_rms_norm_backward", backward_meta);
}

}  // namespace glam
