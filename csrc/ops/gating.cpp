// Top-2 gating: which two experts take each token, with what weight, and in which slot.
//
// Letters: T tokens in G groups of group_size consecutive ones, E experts. p = softmax(logits) in float32 (float64 for
// float64). First choice: the largest p; second: the largest of the rest, or a random one. All first choices of a group
// take their slots before any second choice. Nothing of size T*E is made; the backward recomputes p from the logits.
// aux_loss of a group = E * sum over e of (fraction of first choices e) * (mean p of e); its gradient flows through p.
// Source: GShard (arXiv 2006.16668), algorithm 1, with the choices of praxis' top2_gating_on_logits.

#include <ATen/ops/empty.h>

#include <cstdlib>

#include "glam/ops.h"
#include "ops/routing.h"

namespace glam {
namespace {

constexpr auto kOp = "glam::top2_gating";
constexpr auto kBackwardOp = "glam::_top2_gating_backward";

using GatingSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const OptionalTensor&,
                                                                   const OptionalTensor&, SymInt, SymInt,
                                                                   c10::string_view, double, bool);
using GatingBackwardSignature = Tensor(const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                       const Tensor&, SymInt, bool);

const auto& gating_op() {
  static const auto op = find_op<GatingSignature>(kOp);
  return op;
}
const auto& gating_backward_op() {
  static const auto op = find_op<GatingBackwardSignature>(kBackwardOp);
  return op;
}

}  // namespace

SymInt checks::num_groups(const char* op, const SymInt& num_tokens, const SymInt& group_size) {
  if (TORCH_GUARD_OR_FALSE(group_size.sym_eq(-1))) return 1;
  TORCH_SYM_CHECK(group_size.sym_gt(0), op, ": expected group_size to be -1 (all tokens) or positive, got ",
                  group_size);
  TORCH_SYM_CHECK((num_tokens % group_size).sym_eq(0), op, ": expected group_size to divide T = ", num_tokens, ", got ",
                  group_size);
  return num_tokens / group_size;
}

SecondPolicy checks::second_policy(const char* op, std::string_view name) {
  if (name == "all") return SecondPolicy::all;
  if (name == "random") return SecondPolicy::random;
  TORCH_CHECK(name == "sampling", op, ": expected second_policy to be all, random or sampling, got ", name);
  return SecondPolicy::sampling;
}

bool checks::raise_on_nonfinite() {
  static const char* const value = std::getenv("GLAM_DEBUG_NONFINITE");
  static const bool raise = value && std::string_view(value) == "1";
  return raise;
}

void checks::top2_gating(const Tensor& logits, const OptionalTensor& token_mask, const OptionalTensor& noise,
                         const SymInt& capacity, std::string_view policy_name, double second_threshold) {
  check_floating(kOp, "logits", logits);
  check_dim(kOp, "logits", logits, "[T, E]", 2);
  const SymInt T = logits.sym_size(0), E = logits.sym_size(1);
  TORCH_SYM_CHECK(E.sym_ge(1), kOp, ": expected logits to be [T, E] with at least one expert, got E = ", E);
  TORCH_SYM_CHECK(capacity.sym_ge(1).sym_or(capacity.sym_eq(-1)), kOp,
                  ": expected capacity to be -1 (nothing is dropped) or at least 1, got ", capacity);
  TORCH_CHECK(second_threshold >= 0, kOp, ": expected second_threshold to be 0 or more, got ", second_threshold);
  if (token_mask) {
    check_dtype(kOp, "token_mask", *token_mask, at::kBool);
    check_shape(kOp, "token_mask", *token_mask, "[T]", {T});
    check_same_device(kOp, *token_mask, logits);
  }
  const auto policy = second_policy(kOp, policy_name);
  TORCH_CHECK(noise.has_value() == (policy != SecondPolicy::all), kOp, ": expected noise to be ",
              policy == SecondPolicy::all ? "None" : "uniform numbers", " for second_policy ", policy_name, ", got ",
              noise ? "a tensor" : "None");
  if (noise) {
    const auto dtype = noise->scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, kOp, ": expected noise to be Float or Double, got ",
                dtype);
    if (policy == SecondPolicy::random) {
      check_shape(kOp, "noise", *noise, "[T]", {T});
    } else {
      check_shape(kOp, "noise", *noise, "[T, E]", {T, E});
    }
    check_same_device(kOp, *noise, logits);
  }
}

void checks::top2_gating_backward(const OptionalTensor& grad_gates, const OptionalTensor& grad_aux,
                                  const Tensor& logits, const Tensor& expert_ids, const Tensor& positions,
                                  const SymInt& num_groups) {
  check_floating(kBackwardOp, "logits", logits);
  check_dim(kBackwardOp, "logits", logits, "[T, E]", 2);
  const SymInt T = logits.sym_size(0);
  const auto dtype = accumulation_dtype(logits.scalar_type());
  if (grad_gates) {
    check_dtype(kBackwardOp, "grad_gates", *grad_gates, dtype);
    check_shape(kBackwardOp, "grad_gates", *grad_gates, "[T, 2]", {T, 2});
  }
  if (grad_aux) {
    check_dtype(kBackwardOp, "grad_aux", *grad_aux, dtype);
    check_shape(kBackwardOp, "grad_aux", *grad_aux, "[G]", {num_groups});
  }
  check_dtype(kBackwardOp, "expert_ids", expert_ids, at::kInt);
  check_shape(kBackwardOp, "expert_ids", expert_ids, "[T, 2]", {T, 2});
  check_dtype(kBackwardOp, "positions", positions, at::kInt);
  check_shape(kBackwardOp, "positions", positions, "[T, 2]", {T, 2});
}

namespace {

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

struct GatingFunction : torch::autograd::Function<GatingFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const OptionalTensor& token_mask,
                               const OptionalTensor& noise, SymInt group_size, SymInt capacity,
                               const std::string& second_policy, double second_threshold,
                               bool normalize_before_capacity) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [gates, expert_ids, positions, aux_loss] =
        gating_op().call(logits, token_mask, noise, group_size, std::move(capacity), second_policy, second_threshold,
                         normalize_before_capacity);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({logits, expert_ids, positions});
    ctx->saved_data["group_size"] = std::move(group_size);
    ctx->saved_data["normalize_before_capacity"] = normalize_before_capacity;
    return {gates, expert_ids, positions, aux_loss};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor grad_logits;
    if (ctx->needs_input_grad(0) && (grads[0].defined() || grads[3].defined())) {
      const auto saved = ctx->get_saved_variables();
      grad_logits = gating_backward_op().call(if_defined(grads[0]), if_defined(grads[3]), saved[0], saved[1], saved[2],
                                              ctx->saved_data["group_size"].toSymInt(),
                                              ctx->saved_data["normalize_before_capacity"].toBool());
    }
    return {grad_logits, Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gating_autograd(const Tensor& logits, const OptionalTensor& token_mask,
                                                           const OptionalTensor& noise, SymInt group_size,
                                                           SymInt capacity, c10::string_view second_policy,
                                                           double second_threshold, bool normalize_before_capacity) {
  const auto outputs = GatingFunction::apply(logits, token_mask, noise, std::move(group_size), std::move(capacity),
                                             std::string(second_policy), second_threshold, normalize_before_capacity);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gating_meta(const Tensor& logits, const OptionalTensor& token_mask,
                                                       const OptionalTensor& noise, SymInt group_size, SymInt capacity,
                                                       c10::string_view second_policy, double second_threshold,
                                                       bool /*normalize_before_capacity*/) {
  checks::top2_gating(logits, token_mask, noise, capacity, second_policy, second_threshold);
  const SymInt T = logits.sym_size(0);
  const SymInt G = checks::num_groups(kOp, T, group_size);
  const auto gates = logits.options().dtype(accumulation_dtype(logits.scalar_type()));
  const auto ids = logits.options().dtype(at::kInt);
  return {at::empty_symint({T, 2}, gates), at::empty_symint({T, 2}, ids), at::empty_symint({T, 2}, ids),
          at::empty_symint({G}, gates)};
}

Tensor gating_backward_meta(const OptionalTensor& grad_gates, const OptionalTensor& grad_aux, const Tensor& logits,
                            const Tensor& expert_ids, const Tensor& positions, SymInt group_size,
                            bool /*normalize_before_capacity*/) {
  const SymInt G = checks::num_groups(kBackwardOp, logits.sym_size(0), group_size);
  checks::top2_gating_backward(grad_gates, grad_aux, logits, expert_ids, positions, G);
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> top2_gating(const Tensor& logits, const OptionalTensor& token_mask,
                                                       const OptionalTensor& noise, c10::SymInt group_size,
                                                       c10::SymInt capacity, std::string_view second_policy,
                                                       double second_threshold, bool normalize_before_capacity) {
  return gating_op().call(logits, token_mask, noise, std::move(group_size), std::move(capacity), second_policy,
                          second_threshold, normalize_before_capacity);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  m.def(
      "top2_gating(Tensor logits, Tensor? token_mask, Tensor? noise, SymInt group_size, SymInt capacity=-1, "
      "str second_policy=\"all\", float second_threshold=0., bool normalize_before_capacity=True) "
      "-> (Tensor gates, Tensor expert_ids, Tensor positions, Tensor aux_loss)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_top2_gating_backward(Tensor? grad_gates, Tensor? grad_aux, Tensor logits, Tensor expert_ids, "
      "Tensor positions, SymInt group_size, bool normalize_before_capacity) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("top2_gating", gating_autograd);
  m.impl("_top2_gating_backward", refuse_double_backward());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("top2_gating", gating_meta);
  m.impl("_top2_gating_backward", gating_backward_meta);
}
TORCH_LIBRARY_IMPL(glam, AutocastCPU, m) { m.impl("top2_gating", autocast_to_float32()); }
TORCH_LIBRARY_IMPL(glam, AutocastCUDA, m) { m.impl("top2_gating", autocast_to_float32()); }

}  // namespace glam
