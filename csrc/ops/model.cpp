// Three small ops of the model's wiring.
//
// to_compute_dtype(x, dtype): x in "bfloat16" or "float32"; float64 stays, so that a model in float64 computes everything
// in float64.
// ordered_sum(x): the sum of all elements in their order, in float64, as a scalar of x's dtype: torch's sum depends on the
// number of threads. Differentiable.
// router_statistics(expert_ids, positions, num_experts) -> int64 [E + 6]: rows of each expert, then first choices over
// capacity, second choices over capacity, tokens with 0, 1 and 2 rows, real tokens. Counts, so they add up over
// micro-batches and ranks. Source of the set: praxis gshard_utils.py's over-capacity and dispatch counters.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/common.h"

namespace glam {

Tensor to_compute_dtype(const Tensor& x, std::string_view name) {
  TORCH_CHECK(name == "bfloat16" || name == "float32",
              "glam::to_compute_dtype: expected dtype to be bfloat16 or float32, got ", name);
  if (x.scalar_type() == at::kDouble) return x;
  return x.to(name == "bfloat16" ? at::kBFloat16 : at::kFloat);
}

namespace {

const auto& ordered_sum_op() {
  static const auto op = find_op<Tensor(const Tensor&)>("glam::ordered_sum");
  return op;
}

struct OrderedSumFunction : torch::autograd::Function<OrderedSumFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["sizes"] = x.sym_sizes().vec();
    return ordered_sum_op().call(x);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    return {grads[0].expand_symint(ctx->saved_data["sizes"].toSymIntVector())};
  }
};

Tensor ordered_sum_autograd(const Tensor& x) { return OrderedSumFunction::apply(x); }

Tensor ordered_sum_meta(const Tensor& x) {
  check_floating("glam::ordered_sum", "x", x);
  return at::empty({}, x.options());
}

}  // namespace

Tensor ordered_sum(const Tensor& x) { return ordered_sum_op().call(x); }

Tensor router_statistics(const Tensor& expert_ids, const Tensor& positions, SymInt num_experts) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, SymInt)>("glam::router_statistics");
  return op.call(expert_ids, positions, std::move(num_experts));
}

namespace {

Tensor router_statistics_meta(const Tensor& expert_ids, const Tensor&, SymInt num_experts) {
  return at::empty_symint({num_experts + 6}, expert_ids.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def("to_compute_dtype(Tensor x, str dtype) -> Tensor", to_compute_dtype);
  m.def("ordered_sum(Tensor x) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("router_statistics(Tensor expert_ids, Tensor positions, SymInt num_experts) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("ordered_sum", ordered_sum_autograd);
  m.impl("router_statistics", not_differentiable());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("ordered_sum", ordered_sum_meta);
  m.impl("router_statistics", router_statistics_meta);
}

}  // namespace glam
