// From choices to rows and back: routing_plan orders the tokens by expert, dispatch copies them into rows, combine adds
// the experts' outputs up again.
//
// Letters: T tokens, K choices each, R rows, E experts, G groups, C slots, D model dim. A plan is row_of_choice [T, K],
// choice_of_row [R] (= t * K + k) and offsets [E + 1], int32, with -1 for none; the two maps are inverse to each other,
// so forward and backward both gather in a fixed order: no atomics and the same bits for any number of threads.
// rows[r] = x[choice_of_row[r] / K];  y[t] = sum over k of gates[t, k] * rows[row_of_choice[t, k]], k ascending.
// Source: GShard (arXiv 2006.16668), algorithm 1, lines 21-22, without its T*E*C tensors.

#include <ATen/ops/empty.h>

#include "glam/ops.h"
#include "ops/routing.h"

namespace glam {
namespace {

constexpr auto kPlan = "glam::routing_plan";
constexpr auto kDispatch = "glam::dispatch";
constexpr auto kDispatchBackward = "glam::_dispatch_backward";
constexpr auto kCombine = "glam::combine";
constexpr auto kCombineBackward = "glam::_combine_backward";

using PlanSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, SymInt, SymInt, SymInt);
using DispatchSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&);
using CombineSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&);
using CombineBackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                            const Tensor&, const Tensor&);

const auto& dispatch_backward_op() {
  static const auto op = find_op<DispatchSignature>(kDispatchBackward);
  return op;
}
const auto& combine_backward_op() {
  static const auto op = find_op<CombineBackwardSignature>(kCombineBackward);
  return op;
}

}  // namespace

void checks::routing_plan(const Tensor& expert_ids, const Tensor& positions, const SymInt& num_experts,
                          const SymInt& slots) {
  check_dtype(kPlan, "expert_ids", expert_ids, at::kInt);
  check_dim(kPlan, "expert_ids", expert_ids, "[T, K]", 2);
  const SymInt T = expert_ids.sym_size(0), K = expert_ids.sym_size(1);
  TORCH_SYM_CHECK(K.sym_ge(1), kPlan, ": expected expert_ids to be [T, K] with at least one choice, got K = ", K);
  check_dtype(kPlan, "positions", positions, at::kInt);
  check_shape(kPlan, "positions", positions, "[T, K]", {T, K});
  check_same_device(kPlan, positions, expert_ids);
  TORCH_SYM_CHECK(num_experts.sym_ge(1), kPlan, ": expected num_experts to be at least 1, got ", num_experts);
  TORCH_SYM_CHECK(slots.sym_ge(1).sym_or(slots.sym_eq(-1)), kPlan,
                  ": expected slots to be -1 (tight) or at least 1, got ", slots);
}

void checks::dispatch(const Tensor& x, const Tensor& row_of_choice, const Tensor& choice_of_row,
                      const Tensor& offsets) {
  check_floating(kDispatch, "x", x);
  check_dim(kDispatch, "x", x, "[T, D]", 2);
  plan(kDispatch, row_of_choice, choice_of_row, offsets, x.sym_size(0));
  check_same_device(kDispatch, row_of_choice, x);
  check_same_device(kDispatch, choice_of_row, x);
}

void checks::dispatch_backward(const Tensor& grad_rows, const Tensor& row_of_choice, const Tensor& choice_of_row,
                               const Tensor& offsets) {
  check_floating(kDispatchBackward, "grad_rows", grad_rows);
  plan(kDispatchBackward, row_of_choice, choice_of_row, offsets, -1);
  check_shape(kDispatchBackward, "grad_rows", grad_rows, "[R, D]", {choice_of_row.sym_size(0), -1});
  check_same_device(kDispatchBackward, row_of_choice, grad_rows);
}

void checks::combine(const char* op, const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice,
                     const Tensor& choice_of_row, const Tensor& offsets) {
  check_floating(op, "rows", rows);
  check_dim(op, "gates", gates, "[T, K]", 2);
  plan(op, row_of_choice, choice_of_row, offsets, gates.sym_size(0));
  check_dtype(op, "gates", gates, accumulation_dtype(rows.scalar_type()));
  check_shape(op, "gates", gates, "[T, K]", {row_of_choice.sym_size(0), row_of_choice.sym_size(1)});
  check_shape(op, "rows", rows, "[R, D]", {choice_of_row.sym_size(0), -1});
  check_same_device(op, gates, rows);
  check_same_device(op, row_of_choice, rows);
  check_same_device(op, choice_of_row, rows);
}

void checks::combine_backward(const Tensor& grad_y, const Tensor& rows, const Tensor& gates,
                              const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets) {
  combine(kCombineBackward, rows, gates, row_of_choice, choice_of_row, offsets);
  check_same_dtype(kCombineBackward, "grad_y", grad_y, "rows", rows);
  check_shape(kCombineBackward, "grad_y", grad_y, "[T, D]", {gates.sym_size(0), rows.sym_size(1)});
}

Tensor dispatch(const Tensor& x, const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets) {
  static const auto op = find_op<DispatchSignature>(kDispatch);
  return op.call(x, row_of_choice, choice_of_row, offsets);
}

Tensor combine(const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
               const Tensor& offsets) {
  static const auto op = find_op<CombineSignature>(kCombine);
  return op.call(rows, gates, row_of_choice, choice_of_row, offsets);
}

std::tuple<Tensor, Tensor, Tensor> routing_plan(const Tensor& expert_ids, const Tensor& positions,
                                                c10::SymInt num_experts, c10::SymInt group_size, c10::SymInt slots) {
  static const auto op = find_op<PlanSignature>(kPlan);
  return op.call(expert_ids, positions, std::move(num_experts), std::move(group_size), std::move(slots));
}

namespace {

// Linear in x; the backward is combine's gather with unit gates.
struct DispatchFunction : torch::autograd::Function<DispatchFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& row_of_choice, const Tensor& choice_of_row,
                        const Tensor& offsets) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({row_of_choice, choice_of_row, offsets});
    return dispatch(x, row_of_choice, choice_of_row, offsets);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    Tensor grad_x;
    if (ctx->needs_input_grad(0)) {
      const auto plan = ctx->get_saved_variables();
      grad_x = dispatch_backward_op().call(grads[0], plan[0], plan[1], plan[2]);
    }
    return {grad_x, Tensor(), Tensor(), Tensor()};
  }
};

struct CombineFunction : torch::autograd::Function<CombineFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice,
                        const Tensor& choice_of_row, const Tensor& offsets) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({rows, gates, row_of_choice, choice_of_row, offsets});
    return combine(rows, gates, row_of_choice, choice_of_row, offsets);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    auto [grad_rows, grad_gates] =
        combine_backward_op().call(grads[0], saved[0], saved[1], saved[2], saved[3], saved[4]);
    return {ctx->needs_input_grad(0) ? grad_rows : Tensor(), ctx->needs_input_grad(1) ? grad_gates : Tensor(), Tensor(),
            Tensor(), Tensor()};
  }
};

Tensor dispatch_autograd(const Tensor& x, const Tensor& row_of_choice, const Tensor& choice_of_row,
                         const Tensor& offsets) {
  return DispatchFunction::apply(x, row_of_choice, choice_of_row, offsets);
}
Tensor combine_autograd(const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice,
                        const Tensor& choice_of_row, const Tensor& offsets) {
  return CombineFunction::apply(rows, gates, row_of_choice, choice_of_row, offsets);
}

std::tuple<Tensor, Tensor, Tensor> plan_meta(const Tensor& expert_ids, const Tensor& positions, SymInt num_experts,
                                             SymInt group_size, SymInt slots) {
  checks::routing_plan(expert_ids, positions, num_experts, slots);
  const SymInt T = expert_ids.sym_size(0), K = expert_ids.sym_size(1);
  const SymInt G = checks::num_groups(kPlan, T, group_size);
  const SymInt R = TORCH_GUARD_OR_FALSE(slots.sym_eq(-1)) ? T * K : num_experts * G * slots;
  const auto options = expert_ids.options();
  return {at::empty_symint({T, K}, options), at::empty_symint({R}, options),
          at::empty_symint({num_experts + 1}, options)};
}

Tensor dispatch_meta(const Tensor& x, const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets) {
  checks::dispatch(x, row_of_choice, choice_of_row, offsets);
  return at::empty_symint({choice_of_row.sym_size(0), x.sym_size(1)}, x.options());
}

Tensor dispatch_backward_meta(const Tensor& grad_rows, const Tensor& row_of_choice, const Tensor& choice_of_row,
                              const Tensor& offsets) {
  checks::dispatch_backward(grad_rows, row_of_choice, choice_of_row, offsets);
  return at::empty_symint({row_of_choice.sym_size(0), grad_rows.sym_size(1)}, grad_rows.options());
}

Tensor combine_meta(const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
                    const Tensor& offsets) {
  checks::combine(kCombine, rows, gates, row_of_choice, choice_of_row, offsets);
  return at::empty_symint({gates.sym_size(0), rows.sym_size(1)}, rows.options());
}

std::tuple<Tensor, Tensor> combine_backward_meta(const Tensor& grad_y, const Tensor& rows, const Tensor& gates,
                                                 const Tensor& row_of_choice, const Tensor& choice_of_row,
                                                 const Tensor& offsets) {
  checks::combine_backward(grad_y, rows, gates, row_of_choice, choice_of_row, offsets);
  return {at::empty_symint(rows.sym_sizes(), rows.options()), at::empty_symint(gates.sym_sizes(), gates.options())};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "routing_plan(Tensor expert_ids, Tensor positions, SymInt num_experts, SymInt group_size=-1, SymInt slots=-1) "
      "-> (Tensor row_of_choice, Tensor choice_of_row, Tensor offsets)",
      tags);
  m.def("dispatch(Tensor x, Tensor row_of_choice, Tensor choice_of_row, Tensor offsets) -> Tensor", tags);
  m.def("_dispatch_backward(Tensor grad_rows, Tensor row_of_choice, Tensor choice_of_row, Tensor offsets) -> Tensor",
        tags);
  m.def("combine(Tensor rows, Tensor gates, Tensor row_of_choice, Tensor choice_of_row, Tensor offsets) -> Tensor",
        tags);
  m.def(
      "_combine_backward(Tensor grad_y, Tensor rows, Tensor gates, Tensor row_of_choice, Tensor choice_of_row, "
      "Tensor offsets) -> (Tensor grad_rows, Tensor grad_gates)",
      tags);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("routing_plan", not_differentiable());
  m.impl("dispatch", dispatch_autograd);
  m.impl("_dispatch_backward", refuse_double_backward());
  m.impl("combine", combine_autograd);
  m.impl("_combine_backward", refuse_double_backward());
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("routing_plan", plan_meta);
  m.impl("dispatch", dispatch_meta);
  m.impl("_dispatch_backward", dispatch_backward_meta);
  m.impl("combine", combine_meta);
  m.impl("_combine_backward", combine_backward_meta);
}

}  // namespace glam
