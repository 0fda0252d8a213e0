// The router: logits = x W in float32, with x [..., D], W [D, E], logits [..., E]; float64 for float64 x.
//
// The bits of linear of x in float32, and of its gradients rounded to x's dtype and W's, but neither x nor its gradient
// exists in float32. A row depends on that row of x and on W alone. Autocast changes nothing.
// Source of routing in float32 beside 16-bit activations: Switch Transformer (arXiv 2101.03961, section 2.4).

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/checks.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::router_logits";

using GradientSignature = Tensor(const Tensor&, const Tensor&, at::ScalarType);

const auto& logits_op() {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&)>(kOp);
  return op;
}
const auto& input_gradient_op() {
  static const auto op = find_op<GradientSignature>("glam::_router_logits_input_gradient");
  return op;
}
const auto& weight_gradient_op() {
  static const auto op = find_op<GradientSignature>("glam::_router_logits_weight_gradient");
  return op;
}

}  // namespace

void checks::router_logits(const Tensor& x, const Tensor& weight) {
  check_floating(kOp, "x", x);
  TORCH_CHECK(x.dim() >= 1, kOp, ": expected x to be [..., D] with at least 1 dimension, got a scalar");
  check_shape(kOp, "weight", weight, "[D, E]", {x.sym_size(-1), -1});
  check_weight_dtype(kOp, "weight", weight, x);
  check_same_device(kOp, weight, x);
}

namespace {

struct RouterLogitsFunction : torch::autograd::Function<RouterLogitsFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, weight});
    return logits_op().call(x, weight);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &grad = grads[0];
    Tensor grad_x, grad_weight;
    if (ctx->needs_input_grad(0)) grad_x = input_gradient_op().call(grad, weight, x.scalar_type());
    if (ctx->needs_input_grad(1)) grad_weight = weight_gradient_op().call(x, grad, weight.scalar_type());
    return {grad_x, grad_weight};
  }
};

Tensor logits_autograd(const Tensor& x, const Tensor& weight) { return RouterLogitsFunction::apply(x, weight); }

Tensor logits_meta(const Tensor& x, const Tensor& weight) {
  checks::router_logits(x, weight);
  auto sizes = x.sym_sizes().vec();
  sizes.back() = weight.sym_size(1);
  return at::empty_symint(sizes, x.options().dtype(accumulation_dtype(x.scalar_type())));
}

Tensor input_gradient_meta(const Tensor& grad, const Tensor& weight, at::ScalarType dtype) {
  auto sizes = grad.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, grad.options().dtype(dtype));
}

Tensor weight_gradient_meta(const Tensor& x, const Tensor& grad, at::ScalarType dtype) {
  return at::empty_symint({x.sym_size(-1), grad.sym_size(-1)}, grad.options().dtype(dtype));
}

}  // namespace

Tensor router_logits(const Tensor& x, const Tensor& weight) { return logits_op().call(x, weight); }

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def("router_logits(Tensor x, Tensor weight) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_router_logits_input_gradient(Tensor grad, Tensor weight, ScalarType dtype) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("_router_logits_weight_gradient(Tensor x, Tensor grad, ScalarType dtype) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("router_logits", logits_autograd);
  m.impl("_router_logits_input_gradient", refuse_double_backward());
  m.impl("_router_logits_weight_gradient", refuse_double_backward());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("router_logits", logits_meta);
  m.impl("_router_logits_input_gradient", input_gradient_meta);
  m.impl("_router_logits_weight_gradient", weight_gradient_meta);
}

}  // namespace glam
