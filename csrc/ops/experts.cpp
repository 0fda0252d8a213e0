// Expert feed-forward networks: expert_mlp, moe_mlp and geglu_mlp, three faces of one computation.
//
//   out[r] = act(rows[r] Wi[e]) Wo[e], or (gelu(rows[r] Wg[e]) * (rows[r] Wi[e])) Wo[e] for geglu,
//
// where e is the expert of the segment that holds row r. Letters: R rows, D model dim, F hidden dim, E experts held,
// T tokens, K choices. Segment s = rows [offsets[s], offsets[s + 1]) and uses expert s mod E, so rows received from
// several ranks, ordered (source rank, expert), are used as they come. Rows from offsets[last] on are unused: 0.
// moe_mlp is dispatch, expert_mlp and combine in one: rows are gathered while they are multiplied, and only x, the
// pre-activations and the plan are saved. geglu_mlp is the dense GLaM layer: one expert that has all rows.
//
// Weights are float32 or x's dtype and are rounded to x's dtype where they enter a product; sums are float32 (float64
// for float64). They may be packed for inference (ops/packed_weight.h); nothing then has a gradient. Sources: GShard (arXiv 2006.16668) section 3.2; GLaM (arXiv 2112.06905) section 3; GEGLU from
// arXiv 2002.05202.

#include <ATen/ops/empty.h>

#include <tuple>
#include <utility>

#include "glam/ops.h"
#include "ops/accumulate.h"
#include "ops/checks.h"
#include "ops/experts.h"
#include "ops/large_memory.h"
#include "ops/packed_weight.h"

namespace glam {
namespace {

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using MoeBackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

using ExpertForward = ForwardResult(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                    const OptionalTensor&, c10::string_view);
using ExpertBackward = BackwardResult(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view);
using ExpertBackwardRows = ForwardResult(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                         const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view);
using ExpertBackwardWeights = void(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                   const Tensor&, const Tensor&, c10::string_view, bool, const Tensor&, const Tensor&,
                                   const Tensor&);
using MoeForward = ForwardResult(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                 const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view);
using MoeBackward = MoeBackwardResult(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                      const OptionalTensor&, c10::string_view);
using MoeBackwardInto = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                   const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                   const Tensor&, const Tensor&, const OptionalTensor&,
                                                   c10::string_view, bool, const Tensor&, const Tensor&, const Tensor&);

const auto& expert_backward_op() {
  static const auto op = find_op<ExpertBackward>("glam::_expert_mlp_backward");
  return op;
}
const auto& moe_forward_op() {
  static const auto op = find_op<MoeForward>("glam::_moe_mlp_forward");
  return op;
}
const auto& moe_backward_op() {
  static const auto op = find_op<MoeBackward>("glam::_moe_mlp_backward");
  return op;
}
const auto& moe_backward_into_op() {
  static const auto op = find_op<MoeBackwardInto>("glam::_moe_mlp_backward_into");
  return op;
}

constexpr auto kMutating = {"_expert_mlp_backward_weights", "_moe_mlp_backward_into"};

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
Tensor if_needed(bool needed, const Tensor& gradient) { return needed ? gradient : Tensor(); }

// The gradients of the weights go where `weights` says and are returned with the others.
BackwardResult expert_mlp_backward_into(const Tensor& grad_, const Tensor& rows, const OptionalTensor& offsets,
                                        const Tensor& pre, const Tensor& pre_gate, const Tensor& wi, const Tensor& wo,
                                        const OptionalTensor& wg, c10::string_view activation,
                                        const experts::WeightGradients& weights) {
  const Tensor grad = grad_.contiguous();  // once for both
  const auto [grad_rows, grad_pre, grad_pre_gate] =
      experts::backward_rows(grad, offsets, pre, pre_gate, wi, wo, wg, activation);
  experts::backward_weights(grad, rows, offsets, pre, pre_gate, grad_pre, grad_pre_gate, activation, weights);
  return {grad_rows, weights.wi, weights.wo, weights.wg};
}
BackwardResult expert_mlp_backward(const Tensor& grad, const Tensor& rows, const OptionalTensor& offsets,
                                   const Tensor& pre, const Tensor& pre_gate, const Tensor& wi, const Tensor& wo,
                                   const OptionalTensor& wg, c10::string_view activation) {
  return expert_mlp_backward_into(grad, rows, offsets, pre, pre_gate, wi, wo, wg, activation,
                                  experts::WeightGradients::empty(wi, wo, wg));
}

MoeBackwardResult moe_mlp_backward_into(const Tensor& grad, const Tensor& x, const Tensor& gates,
                                        const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets,
                                        const Tensor& pre, const Tensor& pre_gate, const Tensor& wi, const Tensor& wo,
                                        const OptionalTensor& wg, c10::string_view activation,
                                        const experts::WeightGradients& weights) {
  const auto [grad_x, grad_gates] =
      moe_backward_into_op().call(grad, x, gates, row_of_choice, choice_of_row, offsets, pre, pre_gate, wi, wo, wg,
                                  activation, weights.add, weights.wi, weights.wo, weights.wg);
  return {grad_x, grad_gates, weights.wi, weights.wo, weights.wg};
}
MoeBackwardResult moe_mlp_backward(const Tensor& grad, const Tensor& x, const Tensor& gates,
                                   const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets,
                                   const Tensor& pre, const Tensor& pre_gate, const Tensor& wi, const Tensor& wo,
                                   const OptionalTensor& wg, c10::string_view activation) {
  return moe_mlp_backward_into(grad, x, gates, row_of_choice, choice_of_row, offsets, pre, pre_gate, wi, wo, wg,
                               activation, experts::WeightGradients::empty(wi, wo, wg));
}

struct ExpertFunction : torch::autograd::Function<ExpertFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const OptionalTensor& offsets, const Tensor& wi,
                        const Tensor& wo, const OptionalTensor& wg, std::string activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, pre, pre_gate] = experts::forward(rows, offsets, wi, wo, wg, activation);
    ctx->save_for_backward({rows, or_undefined(offsets), pre, pre_gate, wi, wo, or_undefined(wg)});
    ctx->saved_data["activation"] = std::move(activation);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& [rows, offsets_, pre, pre_gate, wi, wo, wg_] =
        std::tie(saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6]);
    const OptionalTensor offsets = optional(offsets_), wg = optional(wg_);
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    const auto taken = experts::WeightGradients::taken_from(wi, wo, wg);
    const auto [grad_rows, grad_wi, grad_wo, grad_wg] =
        taken ? expert_mlp_backward_into(grads[0], rows, offsets, pre, pre_gate, wi, wo, wg, activation, *taken)
              : expert_backward_op().call(grads[0], rows, offsets, pre, pre_gate, wi, wo, wg, activation);
    const size_t weights = offsets ? 2 : 1;  // absent offsets are no input and have no index
    return {if_needed(ctx->needs_input_grad(0), grad_rows),
            Tensor(),
            if_needed(ctx->needs_input_grad(weights), grad_wi),
            if_needed(ctx->needs_input_grad(weights + 1), grad_wo),
            if_needed(wg.has_value(), grad_wg),
            Tensor()};
  }
};

struct MoeFunction : torch::autograd::Function<MoeFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& gates, const Tensor& row_of_choice,
                        const Tensor& choice_of_row, const Tensor& offsets, const Tensor& wi, const Tensor& wo,
                        const OptionalTensor& wg, std::string activation) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [y, pre, pre_gate] =
        moe_forward_op().call(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, activation);
    ctx->save_for_backward({x, gates, row_of_choice, choice_of_row, offsets, pre, pre_gate, wi, wo, or_undefined(wg)});
    ctx->saved_data["activation"] = std::move(activation);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& [x, gates, row_of_choice, choice_of_row, offsets, pre, pre_gate, wi, wo, wg_] =
        std::tie(saved[0], saved[1], saved[2], saved[3], saved[4], saved[5], saved[6], saved[7], saved[8], saved[9]);
    const OptionalTensor wg = optional(wg_);
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    const auto taken = experts::WeightGradients::taken_from(wi, wo, wg);
    const auto [grad_x, grad_gates, grad_wi, grad_wo, grad_wg] =
        taken ? moe_mlp_backward_into(grads[0], x, gates, row_of_choice, choice_of_row, offsets, pre, pre_gate, wi, wo,
                                      wg, activation, *taken)
              : moe_backward_op().call(grads[0], x, gates, row_of_choice, choice_of_row, offsets, pre, pre_gate, wi, wo,
                                       wg, activation);
    return {if_needed(ctx->needs_input_grad(0), grad_x),
            if_needed(ctx->needs_input_grad(1), grad_gates),
            Tensor(),
            Tensor(),
            Tensor(),
            if_needed(ctx->needs_input_grad(5), grad_wi),
            if_needed(ctx->needs_input_grad(6), grad_wo),
            if_needed(wg.has_value(), grad_wg),
            Tensor()};
  }
};

// Whether the weights are packed, all of them or none; arguments that want a gradient are refused then.
bool runs_packed(const char* op, at::TensorList arguments, const Tensor& wi, const Tensor& wo,
                 const OptionalTensor& wg) {
  const bool packed = packed::is_packed(wi, 3);
  TORCH_CHECK(packed::is_packed(wo, 3) == packed && (!wg || packed::is_packed(*wg, 3) == packed), op,
              ": expected all weights of the experts to be packed, or none, got ", wi.sym_sizes(), " and ",
              wo.sym_sizes());
  if (packed) {
    packed::refuse_gradients(op, arguments);
    packed::refuse_gradients(op, {wi, wo, or_undefined(wg)});
  }
  return packed;
}

Tensor expert_mlp_below_autograd(const Tensor& rows, const Tensor& offsets, const Tensor& wi, const Tensor& wo,
                                 const OptionalTensor& wg, c10::string_view activation) {
  checks::expert_mlp("glam::expert_mlp", rows, offsets, wi, wo, wg, activation);
  return std::get<0>(experts::forward(rows, offsets, wi, wo, wg, activation));
}
Tensor expert_mlp_autograd(const Tensor& rows, const Tensor& offsets, const Tensor& wi, const Tensor& wo,
                           const OptionalTensor& wg, c10::string_view activation) {
  checks::expert_mlp("glam::expert_mlp", rows, offsets, wi, wo, wg, activation);
  if (runs_packed("glam::expert_mlp", {rows}, wi, wo, wg)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return expert_mlp_below_autograd(rows, offsets, wi, wo, wg, activation);
  }
  return ExpertFunction::apply(rows, OptionalTensor(offsets), wi, wo, wg, std::string(activation));
}

Tensor moe_mlp_below_autograd(const Tensor& x, const Tensor& gates, const Tensor& row_of_choice,
                              const Tensor& choice_of_row, const Tensor& offsets, const Tensor& wi, const Tensor& wo,
                              const OptionalTensor& wg, c10::string_view activation) {
  checks::moe_mlp(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, activation);
  return std::get<0>(moe_forward_op().call(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, activation));
}
Tensor moe_mlp_autograd(const Tensor& x, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
                        const Tensor& offsets, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                        c10::string_view activation) {
  checks::moe_mlp(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, activation);
  if (runs_packed("glam::moe_mlp", {x, gates}, wi, wo, wg)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return moe_mlp_below_autograd(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, activation);
  }
  return MoeFunction::apply(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, std::string(activation));
}

// One expert that has all rows; the views keep the weights' gradients whole.
Tensor geglu_mlp_with(const Tensor& x, const Tensor& w0, const Tensor& w1, const Tensor& wo, auto&& run) {
  constexpr auto op = "glam::geglu_mlp";
  check_floating(op, "x", x);
  TORCH_CHECK(x.dim() >= 1, op, ": expected x to be [..., D] with at least 1 dimension, got a scalar");
  const SymInt D = x.sym_size(-1);
  packed::check_weight(op, "w0", w0, "[D, F]", {D, -1}, x);
  const SymInt F = packed::columns(w0, 2);
  packed::check_weight(op, "w1", w1, "[D, F]", {D, F}, x);
  packed::check_weight(op, "wo", wo, "[F, D]", {F, D}, x);
  SymInt num_rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) num_rows = num_rows * x.sym_size(i);
  const Tensor out = run(x.reshape_symint({num_rows, D}), w1.unsqueeze(0), wo.unsqueeze(0), w0.unsqueeze(0));
  return out.view_symint(x.sym_sizes());
}

Tensor geglu_mlp_autograd(const Tensor& x, const Tensor& w0, const Tensor& w1, const Tensor& wo) {
  return geglu_mlp_with(x, w0, w1, wo, [](const Tensor& rows, const Tensor& wi, const Tensor& wo_, const Tensor& wg) {
    if (runs_packed("glam::geglu_mlp", {rows}, wi, wo_, wg)) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return std::get<0>(experts::forward(rows, std::nullopt, wi, wo_, wg, "geglu"));
    }
    return ExpertFunction::apply(rows, OptionalTensor(), wi, wo_, OptionalTensor(wg), std::string("geglu"));
  });
}
Tensor geglu_mlp_below_autograd(const Tensor& x, const Tensor& w0, const Tensor& w1, const Tensor& wo) {
  return geglu_mlp_with(x, w0, w1, wo, [](const Tensor& rows, const Tensor& wi, const Tensor& wo_, const Tensor& wg) {
    return std::get<0>(experts::forward(rows, std::nullopt, wi, wo_, wg, "geglu"));
  });
}

// Meta ------------------------------------------------------------------------------------------------------------

Tensor like(const Tensor& tensor) { return at::empty_symint(tensor.sym_sizes(), tensor.options()); }
Tensor pre_gate_meta(const Tensor& pre, const OptionalTensor& wg) {
  return wg ? like(pre) : at::empty_symint({0}, pre.options());
}

ForwardResult expert_forward_meta(const Tensor& rows, const OptionalTensor&, const Tensor& wi, const Tensor&,
                                  const OptionalTensor& wg, c10::string_view) {
  const Tensor pre = at::empty_symint({rows.sym_size(0), packed::columns(wi, 3)}, rows.options());
  return {like(rows), pre, pre_gate_meta(pre, wg)};
}
BackwardResult expert_backward_meta(const Tensor&, const Tensor& rows, const OptionalTensor&, const Tensor&,
                                    const Tensor&, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                                    c10::string_view) {
  const auto weights = experts::WeightGradients::empty(wi, wo, wg);
  return {like(rows), weights.wi, weights.wo, weights.wg};
}
ForwardResult expert_backward_rows_meta(const Tensor& grad, const OptionalTensor&, const Tensor& pre,
                                        const Tensor& pre_gate, const Tensor&, const Tensor&, const OptionalTensor&,
                                        c10::string_view) {
  return {like(grad), like(pre), like(pre_gate)};
}
void expert_backward_weights_meta(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                                  const Tensor&, const Tensor&, c10::string_view, bool, const Tensor&, const Tensor&,
                                  const Tensor&) {}
ForwardResult moe_forward_meta(const Tensor& x, const Tensor&, const Tensor&, const Tensor& choice_of_row,
                               const Tensor&, const Tensor& wi, const Tensor&, const OptionalTensor& wg,
                               c10::string_view) {
  const Tensor pre = at::empty_symint({choice_of_row.sym_size(0), packed::columns(wi, 3)}, x.options());
  return {like(x), pre, pre_gate_meta(pre, wg)};
}
MoeBackwardResult moe_backward_meta(const Tensor&, const Tensor& x, const Tensor& gates, const Tensor&, const Tensor&,
                                    const Tensor&, const Tensor&, const Tensor&, const Tensor& wi, const Tensor& wo,
                                    const OptionalTensor& wg, c10::string_view) {
  const auto weights = experts::WeightGradients::empty(wi, wo, wg);
  return {like(x), like(gates), weights.wi, weights.wo, weights.wg};
}

std::tuple<Tensor, Tensor> moe_backward_into_meta(const Tensor&, const Tensor& x, const Tensor& gates, const Tensor&,
                                                  const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                  const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view,
                                                  bool, const Tensor&, const Tensor&, const Tensor&) {
  return {like(x), like(gates)};
}

}  // namespace

experts::WeightGradients experts::WeightGradients::empty(const Tensor& wi, const Tensor& wo, const OptionalTensor& wg) {
  const auto gradient = [](const Tensor& weight) {
    return weight.is_meta() ? like(weight) : empty_large(weight.sizes(), weight.options());
  };
  return {gradient(wi), gradient(wo), wg ? gradient(*wg) : at::empty_symint({0}, wi.options())};
}

std::optional<experts::WeightGradients> experts::WeightGradients::taken_from(const Tensor& wi, const Tensor& wo,
                                                                             const OptionalTensor& wg) {
  using accumulate::can_take, accumulate::take;
  if (!accumulate::applies() || !can_take(wi) || !can_take(wo) || (wg && !can_take(*wg))) return {};
  if (wi.is_same(wo) || (wg && (wg->is_same(wi) || wg->is_same(wo)))) return {};
  return WeightGradients{take(wi), take(wo), wg ? take(*wg) : at::empty({0}, wi.options()), true};
}

std::tuple<Tensor, Tensor, Tensor> experts::forward(const Tensor& rows, const OptionalTensor& offsets, const Tensor& wi,
                                                    const Tensor& wo, const OptionalTensor& wg,
                                                    c10::string_view activation) {
  static const auto op = find_op<ExpertForward>("glam::_expert_mlp_forward");
  return op.call(rows, offsets, wi, wo, wg, activation);
}

std::tuple<Tensor, Tensor, Tensor> experts::backward_rows(const Tensor& grad, const OptionalTensor& offsets,
                                                          const Tensor& pre, const Tensor& pre_gate, const Tensor& wi,
                                                          const Tensor& wo, const OptionalTensor& wg,
                                                          c10::string_view activation) {
  static const auto op = find_op<ExpertBackwardRows>("glam::_expert_mlp_backward_rows");
  return op.call(grad, offsets, pre, pre_gate, wi, wo, wg, activation);
}

void experts::backward_weights(const Tensor& grad, const Tensor& rows, const OptionalTensor& offsets, const Tensor& pre,
                               const Tensor& pre_gate, const Tensor& grad_pre, const Tensor& grad_pre_gate,
                               c10::string_view activation, const WeightGradients& gradients) {
  static const auto op = find_op<ExpertBackwardWeights>("glam::_expert_mlp_backward_weights");
  op.call(grad, rows, offsets, pre, pre_gate, grad_pre, grad_pre_gate, activation, gradients.add, gradients.wi,
          gradients.wo, gradients.wg);
}

void checks::plan(const char* op, const Tensor& row_of_choice, const Tensor& choice_of_row, const Tensor& offsets,
                  const SymInt& num_tokens) {
  check_dtype(op, "row_of_choice", row_of_choice, at::kInt);
  check_dtype(op, "choice_of_row", choice_of_row, at::kInt);
  check_dtype(op, "offsets", offsets, at::kInt);
  check_shape(op, "row_of_choice", row_of_choice, "[T, K]", {num_tokens, -1});
  check_dim(op, "choice_of_row", choice_of_row, "[R]", 1);
  check_dim(op, "offsets", offsets, "[E + 1]", 1);
}

void checks::expert_mlp(const char* op, const Tensor& rows, const Tensor& offsets, const Tensor& wi, const Tensor& wo,
                        const OptionalTensor& wg, c10::string_view activation) {
  check_floating(op, "rows", rows);
  check_dim(op, "rows", rows, "[R, D]", 2);
  const SymInt D = rows.sym_size(1);
  packed::check_weight(op, "wi", wi, "[E, D, F]", {-1, D, -1}, rows);
  const SymInt E = wi.sym_size(0), F = packed::columns(wi, 3);
  packed::check_weight(op, "wo", wo, "[E, F, D]", {E, F, D}, rows);
  TORCH_CHECK(activation == "relu" || activation == "gelu" || activation == "geglu", op,
              ": expected activation to be relu, gelu or geglu, got ", activation);
  TORCH_CHECK(wg.has_value() == (activation == "geglu"), op, ": expected wg ",
              activation == "geglu" ? "with geglu, got none" : "only with geglu, got it with ", activation);
  if (wg) {
    packed::check_weight(op, "wg", *wg, "[E, D, F]", {E, D, F}, rows);
  }
  check_dtype(op, "offsets", offsets, at::kInt);
  check_dim(op, "offsets", offsets, "[S + 1]", 1);
  check_same_device(op, offsets, rows);
  TORCH_SYM_CHECK(E.sym_ge(1), op, ": expected at least one expert, got wi with ", E);
  TORCH_SYM_CHECK(offsets.sym_size(0).sym_ge(1), op, ": expected offsets to be [S + 1], got [0]");
  TORCH_SYM_CHECK(((offsets.sym_size(0) - 1) % E).sym_eq(0), op,
                  ": expected offsets to be [S + 1] with S a multiple of the ", E,
                  " experts, got S = ", offsets.sym_size(0) - 1);
}

void checks::moe_mlp(const Tensor& x, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
                     const Tensor& offsets, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                     c10::string_view activation) {
  constexpr auto op = "glam::moe_mlp";
  check_floating(op, "x", x);
  check_dim(op, "x", x, "[T, D]", 2);
  plan(op, row_of_choice, choice_of_row, offsets, x.sym_size(0));
  check_shape(op, "gates", gates, "[T, K]", {x.sym_size(0), row_of_choice.sym_size(1)});
  check_dtype(op, "gates", gates, accumulation_dtype(x.scalar_type()));
  expert_mlp(op, x, offsets, wi, wo, wg, activation);
}

Tensor expert_mlp(const Tensor& rows, const Tensor& offsets, const Tensor& wi, const Tensor& wo,
                  const OptionalTensor& wg, std::string_view activation) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                        const OptionalTensor&, c10::string_view)>("glam::expert_mlp");
  return op.call(rows, offsets, wi, wo, wg, activation);
}

Tensor moe_mlp(const Tensor& x, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
               const Tensor& offsets, const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
               std::string_view activation) {
  static const auto op =
      find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                     const Tensor&, const OptionalTensor&, c10::string_view)>("glam::moe_mlp");
  return op.call(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, activation);
}

Tensor geglu_mlp(const Tensor& x, const Tensor& w0, const Tensor& w1, const Tensor& wo) {
  static const auto op = find_op<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("glam::geglu_mlp");
  return op.call(x, w0, w1, wo);
}

TORCH_LIBRARY_FRAGMENT(glam, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("expert_mlp(Tensor rows, Tensor offsets, Tensor wi, Tensor wo, Tensor? wg, str activation) -> Tensor", tags);
  m.def(
      "moe_mlp(Tensor x, Tensor gates, Tensor row_of_choice, Tensor choice_of_row, Tensor offsets, Tensor wi, "
      "Tensor wo, Tensor? wg, str activation) -> Tensor",
      tags);
  m.def("geglu_mlp(Tensor x, Tensor w0, Tensor w1, Tensor wo) -> Tensor", tags);
  // offsets none: one segment with all rows. pre_gate and the gradient of wg are empty without wg.
  m.def(
      "_expert_mlp_forward(Tensor rows, Tensor? offsets, Tensor wi, Tensor wo, Tensor? wg, str activation) -> "
      "(Tensor out, Tensor pre, Tensor pre_gate)",
      tags);
  m.def(
      "_expert_mlp_backward(Tensor grad, Tensor rows, Tensor? offsets, Tensor pre, Tensor pre_gate, Tensor wi, "
      "Tensor wo, Tensor? wg, str activation) -> (Tensor rows, Tensor wi, Tensor wo, Tensor wg)",
      tags);
  // The two parts of that, for exchange_mlp: what others wait for, then the rest, written or added where the caller
  // wants it.
  m.def(
      "_expert_mlp_backward_rows(Tensor grad, Tensor? offsets, Tensor pre, Tensor pre_gate, Tensor wi, Tensor wo, "
      "Tensor? wg, str activation) -> (Tensor rows, Tensor pre, Tensor pre_gate)",
      tags);
  m.def(
      "_expert_mlp_backward_weights(Tensor grad, Tensor rows, Tensor? offsets, Tensor pre, Tensor pre_gate, "
      "Tensor grad_pre, Tensor grad_pre_gate, str activation, bool add, Tensor(a!) grad_wi, Tensor(b!) grad_wo, "
      "Tensor(c!) grad_wg) -> ()",
      tags);
  m.def(
      "_moe_mlp_forward(Tensor x, Tensor gates, Tensor row_of_choice, Tensor choice_of_row, Tensor offsets, "
      "Tensor wi, Tensor wo, Tensor? wg, str activation) -> (Tensor y, Tensor pre, Tensor pre_gate)",
      tags);
  m.def(
      "_moe_mlp_backward(Tensor grad, Tensor x, Tensor gates, Tensor row_of_choice, Tensor choice_of_row, "
      "Tensor offsets, Tensor pre, Tensor pre_gate, Tensor wi, Tensor wo, Tensor? wg, str activation) -> "
      "(Tensor x, Tensor gates, Tensor wi, Tensor wo, Tensor wg)",
      tags);
  m.def(
      "_moe_mlp_backward_into(Tensor grad, Tensor x, Tensor gates, Tensor row_of_choice, Tensor choice_of_row, "
      "Tensor offsets, Tensor pre, Tensor pre_gate, Tensor wi, Tensor wo, Tensor? wg, str activation, bool add, "
      "Tensor(a!) grad_wi, Tensor(b!) grad_wo, Tensor(c!) grad_wg) -> (Tensor x, Tensor gates)",
      tags);
}
TORCH_LIBRARY_IMPL(glam, Autograd, m) {
  m.impl("expert_mlp", expert_mlp_autograd);
  m.impl("moe_mlp", moe_mlp_autograd);
  m.impl("geglu_mlp", geglu_mlp_autograd);
  for (const char* name : {"_expert_mlp_forward", "_expert_mlp_backward", "_expert_mlp_backward_rows",
                           "_moe_mlp_forward", "_moe_mlp_backward"}) {
    m.impl(name, refuse_double_backward());
  }
  for (const char* name : kMutating) m.impl(name, not_differentiable());
}
TORCH_LIBRARY_IMPL(glam, ADInplaceOrView, m) {
  for (const char* name : kMutating) m.impl(name, bump_mutated_versions());
}
TORCH_LIBRARY_IMPL(glam, CompositeExplicitAutograd, m) {
  m.impl("expert_mlp", expert_mlp_below_autograd);
  m.impl("_expert_mlp_backward", expert_mlp_backward);
  m.impl("moe_mlp", moe_mlp_below_autograd);
  m.impl("_moe_mlp_backward", moe_mlp_backward);
  m.impl("geglu_mlp", geglu_mlp_below_autograd);
}
TORCH_LIBRARY_IMPL(glam, Meta, m) {
  m.impl("_expert_mlp_forward", expert_forward_meta);
  m.impl("_expert_mlp_backward", expert_backward_meta);
  m.impl("_expert_mlp_backward_rows", expert_backward_rows_meta);
  m.impl("_expert_mlp_backward_weights", expert_backward_weights_meta);
  m.impl("_moe_mlp_forward", moe_forward_meta);
  m.impl("_moe_mlp_backward", moe_backward_meta);
  m.impl("_moe_mlp_backward_into", moe_backward_into_meta);
}
namespace {
void register_autocast(torch::Library& m) {
  for (const char* name : {"expert_mlp", "moe_mlp", "geglu_mlp"}) m.impl(name, autocast_leading_arguments<1>());
}
}  // namespace
TORCH_LIBRARY_IMPL(glam, AutocastCPU, m) { register_autocast(m); }
TORCH_LIBRARY_IMPL(glam, AutocastCUDA, m) { register_autocast(m); }

}  // namespace glam
