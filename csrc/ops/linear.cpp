// Linear: y = x W, with x [..., D_in], W [D_in, D_out], y [..., D_out] in x's dtype; linear_wide leaves the sums in
// float32, as logits want them.
//
// W is rounded to x's dtype where it enters the product, and sums are float32 (float64 for float64). A row of y depends
// on that row of x and on W alone, to the bit. The weight gradient has W's dtype. W may be packed for inference
// (ops/packed_weight.h); nothing then has a gradient.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/checks.h"
#include "ops/packed_weight.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::linear";

using LinearSignature = Tensor(const Tensor&, const Tensor&);
using WeightGradientSignature = Tensor(const Tensor&, const Tensor&, at::ScalarType);

const auto& linear_op() {
  static const auto op = find_op<LinearSignature>(kOp);
  return op;
}
const auto& linear_wide_op() {
  static const auto op = find_op<LinearSignature>("glam::linear_wide");
  return op;
}
const auto& weight_gradient_op() {
  static const auto op = find_op<WeightGradientSignature>("glam::_linear_weight_gradient");
  return op;
}

}  // namespace

void checks::linear(const Tensor& x, const Tensor& weight) {
  check_floating(kOp, "x", x);
  TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to be [..., D_in] with at least 1 dimension, got a scalar");
  packed::check_weight(kOp, "weight", weight, "[D_in, D_out]", {x.sym_size(-1), -1}, x);
}

namespace {

template <bool wide>
struct LinearFunction : torch::autograd::Function<LinearFunction<wide>> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    return (wide ? linear_wide_op() : linear_op()).call(x, weight);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Tensor grad = grads[0].to(x.scalar_type());
    Tensor grad_x, grad_weight;
    if (ctx->needs_input_grad(0)) grad_x = linear_op().call(grad, weight.t());
    if (ctx->needs_input_grad(1)) grad_weight = weight_gradient_op().call(x, grad, weight.scalar_type());
    return {grad_x, grad_weight};
  }
};

template <bool wide>
Tensor linear_autograd(const Tensor& x, const Tensor& weight) {
  if (packed::is_packed(weight, 2)) {
    packed::refuse_gradients(kOp, {x, weight});
    at::AutoDispatchBelowADInplaceOrView guard;
    return (wide ? linear_wide_op() : linear_op()).call(x, weight);
  }
  return LinearFunction<wide>::apply(x, weight);
}

template <bool wide>
Tensor linear_meta(const Tensor& x, const Tensor& weight) {
  checks::linear(x, weight);
  auto sizes = x.sym_sizes().vec();
  sizes.back() = packed::columns(weight, 2);
  const auto dtype = wide ? accumulation_dtype(x.scalar_type()) : x.scalar_type();
  return at::empty_symint(sizes, x.options().dtype(dtype));
}

Tensor weight_gradient_meta(const Tensor& x, const Tensor& grad, at::ScalarType dtype) {
  return at::empty_symint({x.sym_size(-1), grad.sym_size(-1)}, x.options().dtype(dtype));
}

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight) { return linear_op().call(x, weight); }
Tensor linear_wide(const Tensor& x, const Tensor& weight) { return linear_wide_op().call(x, weight); }

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def("linear(Tensor x, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_wide(Tensor x, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_linear_weight_gradient(Tensor x, Tensor grad, ScalarType dtype) -> Tensor", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("linear", linear_autograd<false>);
  m.impl("linear_wide", linear_autograd<true>);
  m.impl("_linear_weight_gradient", refuse_double_backward());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("linear", linear_meta<false>);
  m.impl("linear_wide", linear_meta<true>);
  m.impl("_linear_weight_gradient", weight_gradient_meta);
}
TORCH_LIBRARY_IMPL(glam, AutocastCPU, m) {
  m.impl("linear", autocast_leading_arguments<1>());
  m.impl("linear_wide", autocast_leading_arguments<1>());
}
TORCH_LIBRARY_IMPL(glam, AutocastCUDA, m) {
  m.impl("linear", autocast_leading_arguments<1>());
  m.impl("linear_wide", autocast_leading_arguments<1>());
}

}  // namespace glam
