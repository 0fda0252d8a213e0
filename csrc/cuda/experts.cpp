// expert_mlp, moe_mlp and geglu_mlp on CUDA tensors (kernels/experts.h). Offsets and plans stay unread on the host: the
// kernels find their segments on the device.
//
// Weights whose dtype is neither the activations' nor float32 are converted first, and their gradients last. The
// dispatched rows and act(pre) never exist; the experts' outputs and the rows' gradients do, in the accumulation dtype,
// between a product and the sum over a token's choices.

#include "ops/experts.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "cuda/common.h"
#include "cuda/kernels/experts.h"
#include "cuda/kernels/routing.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

Activation activation_of(c10::string_view name) {
  return name == "relu" ? Activation::relu : name == "gelu" ? Activation::gelu : Activation::geglu;
}

bool kernels_take(const Tensor& weight, at::ScalarType compute) {
  return weight.scalar_type() == compute || (weight.scalar_type() == at::kFloat && compute != at::kDouble);
}

// The weights as the kernels take them, contiguous and of one dtype; wg undefined unless geglu.
struct Weights {
  Tensor wi, wo, wg;

  Weights(const char* op, const Tensor& wi_, const Tensor& wo_, const OptionalTensor& wg_, at::ScalarType compute) {
    refuse_packed(op, "wi", "[E, D, F]", wi_, 3);
    const bool as_they_are = kernels_take(wi_, compute) && wo_.scalar_type() == wi_.scalar_type() &&
                             (!wg_ || wg_->scalar_type() == wi_.scalar_type());
    const auto take = [&](const Tensor& weight) { return (as_they_are ? weight : weight.to(compute)).contiguous(); };
    wi = take(wi_);
    wo = take(wo_);
    if (wg_) wg = take(*wg_);
  }
};

ExpertProblem problem_of(const OptionalTensor& offsets, int64_t R, int64_t D, int64_t F, int64_t E,
                         c10::string_view activation, const Tensor& like, const Tensor& weight) {
  return {.R = R,
          .D = D,
          .F = F,
          .E = E,
          .S = offsets ? offsets->numel() - 1 : 1,
          .offsets = offsets ? indices(*offsets) : nullptr,
          .activation = activation_of(activation),
          .type = type_of(like),
          .weight_type = type_of(weight)};
}

OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(tensor->contiguous()) : std::nullopt;
}

RowSource plain(const Tensor& rows) { return {.data = data(rows)}; }
RowSource gathered(const Tensor& tokens, const Tensor& choice_of_row, int64_t num_choices) {
  const int64_t choices = tokens.size(0) * num_choices;
  TORCH_CHECK(choices <= std::numeric_limits<int32_t>::max(),
              "glam::moe_mlp: expected T * K to be less than 2^31, got ", choices);
  return {.data = data(tokens),
          .choice_of_row = indices(choice_of_row),
          .num_choices = num_choices,
          .num_tokens = tokens.size(0)};
}

// The pre-activations, or their gradients: [R, F] each, pre_gate empty unless geglu.
struct Hidden {
  Tensor pre, pre_gate;
};

Hidden empty_hidden(int64_t R, int64_t F, bool geglu, const at::TensorOptions& options) {
  return {at::empty({R, F}, options), geglu ? at::empty({R, F}, options) : at::empty({0}, options)};
}

// Fills or adds to the weights' gradients. The kernels write them where they are if all have a dtype and layout that
// they take, and otherwise temporaries in the accumulation dtype.
void backward_weights(const ExpertProblem& problem, const RowSource& grad, const RowSource& rows, const Hidden& hidden,
                      const Hidden& grad_hidden, const void* gates, bool add, const Tensor& grad_wi,
                      const Tensor& grad_wo, const Tensor& grad_wg, cudaStream_t stream) {
  const auto compute = hidden.pre.scalar_type(), dtype = grad_wi.scalar_type();
  const auto writable = [&](const Tensor& gradient) {
    return gradient.numel() == 0 || (gradient.scalar_type() == dtype && gradient.is_contiguous());
  };
  const bool direct = kernels_take(grad_wi, compute) && writable(grad_wi) && writable(grad_wo) && writable(grad_wg);
  const auto target = [&](const Tensor& gradient) {
    return direct ? gradient : at::empty(gradient.sizes(), gradient.options().dtype(accumulation_dtype(compute)));
  };
  const Tensor wi = target(grad_wi), wo = target(grad_wo), wg = target(grad_wg);
  ExpertProblem typed = problem;
  typed.weight_type = type_of(wi);
  expert_backward_weights(typed, grad, rows, data(hidden.pre), data(hidden.pre_gate), data(grad_hidden.pre),
                          data(grad_hidden.pre_gate), gates, add && direct, mutable_data(wi), mutable_data(wo),
                          mutable_data(wg), stream);
  if (direct) return;
  for (const auto& [gradient, sum] : {std::pair{&grad_wi, &wi}, {&grad_wo, &wo}, {&grad_wg, &wg}}) {
    add ? gradient->add_(*sum) : gradient->copy_(*sum);
  }
}

// expert_mlp ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> expert_mlp_forward(const Tensor& rows_, const OptionalTensor& offsets_,
                                                      const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                                                      c10::string_view activation) {
  const Tensor rows = rows_.contiguous();
  const OptionalTensor offsets = contiguous(offsets_);
  const Weights weights("glam::expert_mlp", wi, wo, wg, rows.scalar_type());
  const int64_t R = rows.size(0), D = rows.size(1), E = wi.size(0), F = wi.size(2);
  const OnDevice device(rows);
  const Hidden hidden = empty_hidden(R, F, wg.has_value(), rows.options());
  Tensor out = at::empty({R, D}, rows.options());
  const auto problem = problem_of(offsets, R, D, F, E, activation, rows, weights.wi);
  expert_up(problem, plain(rows), data(weights.wi), data(weights.wg), mutable_data(hidden.pre),
            mutable_data(hidden.pre_gate), device.stream());
  expert_down(problem, data(hidden.pre), data(hidden.pre_gate), data(weights.wo), mutable_data(out), false,
              device.stream());
  return {out, hidden.pre, hidden.pre_gate};
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward_rows(const Tensor& grad_, const OptionalTensor& offsets_,
                                                            const Tensor& pre_, const Tensor& pre_gate_,
                                                            const Tensor& wi, const Tensor& wo,
                                                            const OptionalTensor& wg, c10::string_view activation) {
  const Tensor grad = grad_.contiguous(), pre = pre_.contiguous(), pre_gate = pre_gate_.contiguous();
  const OptionalTensor offsets = contiguous(offsets_);
  const Weights weights("glam::expert_mlp", wi, wo, wg, grad.scalar_type());
  const int64_t R = grad.size(0), D = grad.size(1), E = wi.size(0), F = wi.size(2);
  const OnDevice device(grad);
  const Hidden grad_hidden = empty_hidden(R, F, wg.has_value(), grad.options());
  Tensor grad_rows = at::empty({R, D}, grad.options());
  const auto problem = problem_of(offsets, R, D, F, E, activation, grad, weights.wi);
  expert_backward_hidden(problem, plain(grad), data(pre), data(pre_gate), data(weights.wo), nullptr,
                         mutable_data(grad_hidden.pre), mutable_data(grad_hidden.pre_gate), nullptr, device.stream());
  expert_backward_rows(problem, data(grad_hidden.pre), data(grad_hidden.pre_gate), data(weights.wi), data(weights.wg),
                       mutable_data(grad_rows), false, device.stream());
  return {grad_rows, grad_hidden.pre, grad_hidden.pre_gate};
}

void expert_mlp_backward_weights(const Tensor& grad_, const Tensor& rows_, const OptionalTensor& offsets_,
                                 const Tensor& pre, const Tensor& pre_gate, const Tensor& grad_pre,
                                 const Tensor& grad_pre_gate, c10::string_view activation, bool add,
                                 const Tensor& grad_wi, const Tensor& grad_wo, const Tensor& grad_wg) {
  const Tensor grad = grad_.contiguous(), rows = rows_.contiguous();
  const OptionalTensor offsets = contiguous(offsets_);
  const OnDevice device(grad);
  const auto problem =
      problem_of(offsets, rows.size(0), rows.size(1), grad_wi.size(2), grad_wi.size(0), activation, rows, grad_wi);
  backward_weights(problem, plain(grad), plain(rows), {pre.contiguous(), pre_gate.contiguous()},
                   {grad_pre.contiguous(), grad_pre_gate.contiguous()}, nullptr, add, grad_wi, grad_wo, grad_wg,
                   device.stream());
}

// moe_mlp ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> moe_mlp_forward(const Tensor& x_, const Tensor& gates_, const Tensor& row_of_choice_,
                                                   const Tensor& choice_of_row_, const Tensor& offsets_,
                                                   const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                                                   c10::string_view activation) {
  const Tensor x = x_.contiguous(), gates = gates_.contiguous(), offsets = offsets_.contiguous();
  const Tensor row_of_choice = row_of_choice_.contiguous(), choice_of_row = choice_of_row_.contiguous();
  const Weights weights("glam::moe_mlp", wi, wo, wg, x.scalar_type());
  const int64_t T = x.size(0), D = x.size(1), K = row_of_choice.size(1), R = choice_of_row.size(0);
  const int64_t E = wi.size(0), F = wi.size(2);
  const OnDevice device(x);
  const Hidden hidden = empty_hidden(R, F, wg.has_value(), x.options());
  const Tensor out = at::empty({R, D}, x.options().dtype(accumulation_dtype(x.scalar_type())));
  Tensor y = at::empty(x.sizes(), x.options());
  const auto problem = problem_of(offsets, R, D, F, E, activation, x, weights.wi);
  expert_up(problem, gathered(x, choice_of_row, K), data(weights.wi), data(weights.wg), mutable_data(hidden.pre),
            mutable_data(hidden.pre_gate), device.stream());
  expert_down(problem, data(hidden.pre), data(hidden.pre_gate), data(weights.wo), mutable_data(out), true,
              device.stream());
  combine(data(out), type_of(out), data(gates), indices(row_of_choice), T, K, R, D, mutable_data(y), type_of(y),
          device.stream());
  return {y, hidden.pre, hidden.pre_gate};
}

std::tuple<Tensor, Tensor> moe_mlp_backward_into(const Tensor& grad_, const Tensor& x_, const Tensor& gates_,
                                                 const Tensor& row_of_choice_, const Tensor& choice_of_row_,
                                                 const Tensor& offsets_, const Tensor& pre, const Tensor& pre_gate,
                                                 const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                                                 c10::string_view activation, bool add, const Tensor& grad_wi,
                                                 const Tensor& grad_wo, const Tensor& grad_wg) {
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), gates = gates_.contiguous();
  const Tensor row_of_choice = row_of_choice_.contiguous(), choice_of_row = choice_of_row_.contiguous();
  const OptionalTensor offsets = offsets_.contiguous();
  const Weights weights("glam::moe_mlp", wi, wo, wg, x.scalar_type());
  const int64_t T = x.size(0), D = x.size(1), K = row_of_choice.size(1), R = choice_of_row.size(0);
  const int64_t E = wi.size(0), F = wi.size(2);
  const OnDevice device(x);
  const Hidden hidden = {pre.contiguous(), pre_gate.contiguous()};
  const Hidden grad_hidden = empty_hidden(R, F, wg.has_value(), x.options());
  const Tensor grad_rows = at::empty({R, D}, gates.options()), parts = at::empty({R, gate_parts(F)}, gates.options());
  Tensor grad_x = at::empty(x.sizes(), x.options()), grad_gates = at::empty(gates.sizes(), gates.options());
  const auto problem = problem_of(offsets, R, D, F, E, activation, x, weights.wi);
  const RowSource dy = gathered(grad, choice_of_row, K);
  expert_backward_hidden(problem, dy, data(hidden.pre), data(hidden.pre_gate), data(weights.wo), data(gates),
                         mutable_data(grad_hidden.pre), mutable_data(grad_hidden.pre_gate), mutable_data(parts),
                         device.stream());
  gate_gradients(problem, indices(row_of_choice), T * K, data(parts), mutable_data(grad_gates), device.stream());
  expert_backward_rows(problem, data(grad_hidden.pre), data(grad_hidden.pre_gate), data(weights.wi), data(weights.wg),
                       mutable_data(grad_rows), true, device.stream());
  combine(data(grad_rows), type_of(grad_rows), nullptr, indices(row_of_choice), T, K, R, D, mutable_data(grad_x),
          type_of(grad_x), device.stream());
  backward_weights(problem, dy, gathered(x, choice_of_row, K), hidden, grad_hidden, data(gates), add, grad_wi, grad_wo,
                   grad_wg, device.stream());
  return {grad_x, grad_gates};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("_expert_mlp_forward", expert_mlp_forward);
  m.impl("_expert_mlp_backward_rows", expert_mlp_backward_rows);
  m.impl("_expert_mlp_backward_weights", expert_mlp_backward_weights);
  m.impl("_moe_mlp_forward", moe_mlp_forward);
  m.impl("_moe_mlp_backward_into", moe_mlp_backward_into);
}

}  // namespace glam::cuda
