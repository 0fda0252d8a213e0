// CPU kernels of the expert networks (ops/experts.cpp): four lists of products and two row-wise passes.
//
// Forward: pre = rows Wi, then out = act(pre) Wo with the activation applied while act(pre) is packed. Backward, in three
// steps: grad_hidden = dy Wo^T stays in the block that made it, where it gives the gate's gradient and grad_pre; then the
// rows' gradient; then the weights', which read activations and dispatched rows through the packing, so neither exists as
// a tensor. Rows are gathered from tokens by choice_of_row; no [R, D] copy of x is made.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>

#include "cpu/gemm.h"
#include "cpu/indices.h"
#include "cpu/kernels/experts.h"
#include "cpu/row_functions.h"
#include "ops/checks.h"
#include "ops/experts.h"
#include "ops/large_memory.h"
#include "ops/packed_weight.h"

namespace glam::cpu {
namespace {

constexpr int64_t kTokensPerTask = 16;

Transform activation_of(c10::string_view name) {
  return name == "relu" ? Transform::relu : name == "gelu" ? Transform::gelu : Transform::geglu;
}

// Where the rows of each segment lie, and the rows of one expert over all segments.
class Segments {
 public:
  Segments(const char* op, const OptionalTensor& offsets, int64_t num_rows, int64_t num_experts)
      : num_rows_(num_rows), num_experts_(num_experts) {
    if (offsets) {
      const Tensor contiguous = offsets->contiguous();
      const auto* begin = contiguous.const_data_ptr<int32_t>();
      offsets_.assign(begin, begin + contiguous.numel());
    } else {
      offsets_ = {0, static_cast<int32_t>(num_rows)};
    }
    TORCH_CHECK(
        offsets_.front() == 0 && std::is_sorted(offsets_.begin(), offsets_.end()) && offsets_.back() <= num_rows, op,
        ": expected offsets to ascend from 0 to at most R = ", num_rows, ", got ", offsets_);
  }
  int64_t count() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t begin(int64_t segment) const { return offsets_[segment]; }
  int64_t rows(int64_t segment) const { return offsets_[segment + 1] - offsets_[segment]; }
  int64_t expert(int64_t segment) const { return segment % num_experts_; }
  int64_t used() const { return offsets_.back(); }
  int64_t num_rows() const { return num_rows_; }
  int64_t num_experts() const { return num_experts_; }

  // For each expert the indices of its rows, segment after segment, in one array; starts[e] .. starts[e + 1].
  std::pair<std::vector<int32_t>, std::vector<int64_t>> rows_by_expert() const {
    std::vector<int32_t> rows_of(static_cast<size_t>(used()));
    std::vector<int64_t> starts = {0};
    for (int64_t e = 0; e < num_experts_; ++e) {
      int64_t next = starts.back();
      for (int64_t s = e; s < count(); s += num_experts_) {
        std::iota(rows_of.begin() + next, rows_of.begin() + next + rows(s), static_cast<int32_t>(begin(s)));
        next += rows(s);
      }
      starts.push_back(next);
    }
    return {std::move(rows_of), std::move(starts)};
  }

 private:
  std::vector<int32_t> offsets_;
  int64_t num_rows_;
  int64_t num_experts_;
};

Output from_row(Output rows, int64_t begin) {
  rows.data = advance(rows.data, rows.type, begin * rows.row_stride);
  return rows;
}

// The same rows as the reduction index k, picked by `picked` (through the operand's own gather, if it has one).
Operand as_reduction(Operand rows, const int32_t* picked) {
  rows.rows_are_k = true;
  rows.row_index = picked;
  return rows;
}

struct Weights {
  Tensor wi, wo, wg;  // contiguous, plain or packed; wg undefined unless geglu
  Precision precision;

  Weights(const Tensor& wi_, const Tensor& wo_, const OptionalTensor& wg_, at::ScalarType compute)
      : wi(wi_.contiguous()),
        wo(wo_.contiguous()),
        wg(wg_ ? wg_->contiguous() : Tensor()),
        precision(precision_of(compute)) {}
  int64_t hidden_dim() const { return packed::columns(wi, 3).expect_int(); }
  Operand columns(const Tensor& weight, int64_t expert) const { return outer_columns(weight[expert]); }
  Operand transposed_columns(const Tensor& weight, int64_t expert) const { return outer_columns(weight[expert].t()); }
};

Operand hidden_operand(const Tensor& pre, const Tensor& pre_gate, Transform activation) {
  Operand hidden = outer_rows(pre);
  hidden.transform = activation;
  hidden.gate = activation == Transform::geglu ? pre_gate.const_data_ptr() : nullptr;
  return hidden;
}

// values[used:] = 0: rows that belong to no segment are written too.
void zero_unused(const Tensor& values, int64_t used) {
  if (values.numel() > 0 && used < values.size(0)) values.narrow(0, used, values.size(0) - used).zero_();
}

// The pre-activations, or their gradients: [R, F] each, pre_gate empty unless geglu.
struct Hidden {
  Tensor pre, pre_gate;
};

Hidden empty_hidden(int64_t R, int64_t F, bool geglu, const at::TensorOptions& options) {
  return {empty_large({R, F}, options), geglu ? empty_large({R, F}, options) : at::empty({0}, options)};
}

void zero_unused(const Hidden& hidden, int64_t used) {
  zero_unused(hidden.pre, used);
  zero_unused(hidden.pre_gate, used);
}

template <class T>
Hidden forward(const Operand& rows, const Tensor& like, const Segments& segments, const Weights& weights,
               Transform activation, const Tensor& out) {
  const int64_t R = segments.num_rows(), D = out.size(1), F = weights.hidden_dim();
  Hidden hidden = empty_hidden(R, F, weights.wg.defined(), like.options());
  std::vector<Product> up, down;
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t begin = segments.begin(s), count = segments.rows(s), e = segments.expert(s);
    if (count == 0) continue;
    const Operand a = from_row<T>(rows, begin);
    up.push_back({a, weights.columns(weights.wi, e), from_row(output_to(hidden.pre), begin), count, F, D});
    if (weights.wg.defined()) {
      up.push_back({a, weights.columns(weights.wg, e), from_row(output_to(hidden.pre_gate), begin), count, F, D});
    }
    const Operand activated = from_row<T>(hidden_operand(hidden.pre, hidden.pre_gate, activation), begin);
    down.push_back({activated, weights.columns(weights.wo, e), from_row(output_to(out), begin), count, D, F});
  }
  run_products<T>(up, weights.precision);
  run_products<T>(down, weights.precision);
  zero_unused(hidden, segments.used());
  zero_unused(out, segments.used());
  return hidden;
}

// The hidden gradients. grad: rows of dy, gathered where they are tokens'. gates [R] scale them; grad_gates [R] receives
// <act(pre), dy Wo^T> (both null when there are no gates).
template <class T>
Hidden backward_hidden(const Operand& grad, const Segments& segments, const Hidden& hidden, const Weights& weights,
                       Transform activation, const T* gates, T* grad_gates) {
  const int64_t D = weights.wi.size(1), F = weights.wi.size(2);
  const bool geglu = weights.wg.defined();
  Hidden grad_hidden = empty_hidden(segments.num_rows(), F, geglu, hidden.pre.options());
  std::vector<Product> through_wo;
  std::vector<int64_t> first_row;
  for (int64_t s = 0; s < segments.count(); ++s) {
    if (segments.rows(s) == 0) continue;
    through_wo.push_back({from_row<T>(grad, segments.begin(s)),
                          weights.transposed_columns(weights.wo, segments.expert(s)), Output{}, segments.rows(s), F,
                          D});
    first_row.push_back(segments.begin(s));
  }
  const Type type = type_of(hidden.pre);
  const auto at_row = [&](const Tensor& matrix, int64_t row) {
    return advance(matrix.mutable_data_ptr(), type, row * F);
  };
  run_products<T>(
      through_wo, weights.precision, [&](int64_t index, int64_t row, int64_t count, T* values, int64_t stride) {
        const int64_t begin = first_row[index] + row;
        expert_functions<T>().backward_rows({.activation = activation,
                                             .grad_hidden = values,
                                             .grad_stride = stride,
                                             .rows = count,
                                             .hidden_dim = F,
                                             .type = type,
                                             .pre = at_row(hidden.pre, begin),
                                             .pre_gate = geglu ? at_row(hidden.pre_gate, begin) : nullptr,
                                             .grad_pre = at_row(grad_hidden.pre, begin),
                                             .grad_pre_gate = geglu ? at_row(grad_hidden.pre_gate, begin) : nullptr,
                                             .gates = gates ? gates + begin : nullptr,
                                             .grad_gates = grad_gates ? grad_gates + begin : nullptr});
      });
  zero_unused(grad_hidden, segments.used());
  return grad_hidden;
}

// The rows' gradient [R, D], in the accumulation dtype.
template <class T>
Tensor backward_rows(const Segments& segments, const Hidden& grad_hidden, const Weights& weights) {
  const int64_t R = segments.num_rows(), D = weights.wi.size(1), F = weights.wi.size(2);
  const Tensor grad_rows =
      empty_large({R, D}, at::TensorOptions(sizeof(T) == sizeof(double) ? at::kDouble : at::kFloat));
  std::vector<Product> through_wi, through_wg;
  for (int64_t s = 0; s < segments.count(); ++s) {
    const int64_t begin = segments.begin(s), count = segments.rows(s), e = segments.expert(s);
    if (count == 0) continue;
    through_wi.push_back({from_row<T>(outer_rows(grad_hidden.pre), begin), weights.transposed_columns(weights.wi, e),
                          from_row(output_to(grad_rows), begin), count, D, F});
    if (weights.wg.defined()) {
      through_wg.push_back({from_row<T>(outer_rows(grad_hidden.pre_gate), begin),
                            weights.transposed_columns(weights.wg, e), from_row(output_to(grad_rows, true), begin),
                            count, D, F});
    }
  }
  run_products<T>(through_wi, weights.precision);
  run_products<T>(through_wg, weights.precision);
  zero_unused(grad_rows, segments.used());
  return grad_rows;
}

// Fills the weights' gradients. grad, rows and gates as in backward_hidden; `rows` are what the experts received.
template <class T>
void backward_weights(const Operand& grad, const Operand& rows, const Segments& segments, const Hidden& hidden,
                      const Hidden& grad_hidden, Transform activation, const T* gates,
                      const experts::WeightGradients& gradients) {
  const int64_t D = gradients.wi.size(1), F = gradients.wi.size(2);
  const auto [picked_rows, starts] = segments.rows_by_expert();
  // What the gathers of `rows` and `grad` see, row by row of each expert, and the gates in that order.
  std::vector<int32_t> picked_source(picked_rows.size());
  std::vector<T> picked_gates(gates ? picked_rows.size() : 0);
  for (size_t i = 0; i < picked_rows.size(); ++i) {
    picked_source[i] = rows.row_index ? rows.row_index[picked_rows[i]] : picked_rows[i];
    if (gates) picked_gates[i] = gates[picked_rows[i]];
  }
  std::vector<Product> products;
  for (int64_t e = 0; e < segments.num_experts(); ++e) {
    const int64_t start = starts[e], depth = starts[e + 1] - start;
    if (depth == 0 && gradients.add) continue;
    const Operand x_k = as_reduction(rows, picked_source.data() + start);
    Operand grad_k = as_reduction(grad, picked_source.data() + start);
    grad_k.row_scale = gates ? picked_gates.data() + start : nullptr;
    const Operand hidden_k =
        as_reduction(hidden_operand(hidden.pre, hidden.pre_gate, activation), picked_rows.data() + start);
    const auto grad_pre_k = [&](const Tensor& matrix) {
      return as_reduction(outer_rows(matrix), picked_rows.data() + start);
    };
    const auto output = [&](const Tensor& gradient) {
      return gradients.add ? output_to(gradient[e], true) : output_to_part(gradient[e], gradient);
    };
    products.push_back({hidden_k, grad_k, output(gradients.wo), F, D, depth});
    products.push_back({x_k, grad_pre_k(grad_hidden.pre), output(gradients.wi), D, F, depth});
    if (activation == Transform::geglu) {
      products.push_back({x_k, grad_pre_k(grad_hidden.pre_gate), output(gradients.wg), D, F, depth});
    }
  }
  run_products<T>(products, precision_of(hidden.pre.scalar_type()));
}

// expert_mlp ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> expert_mlp_forward(const Tensor& rows_, const OptionalTensor& offsets,
                                                      const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                                                      c10::string_view activation) {
  const Tensor rows = rows_.contiguous();
  const Segments segments("glam::expert_mlp", offsets, rows.size(0), wi.size(0));
  const Weights weights(wi, wo, wg, rows.scalar_type());
  const Tensor out = empty_large(rows.sizes(), rows.options());
  const Hidden hidden = dispatch_accumulation(rows.scalar_type(), [&](auto zero) {
    return forward<decltype(zero)>(outer_rows(rows), rows, segments, weights, activation_of(activation), out);
  });
  return {out, hidden.pre, hidden.pre_gate};
}

std::tuple<Tensor, Tensor, Tensor> expert_mlp_backward_rows(const Tensor& grad_, const OptionalTensor& offsets,
                                                            const Tensor& pre, const Tensor& pre_gate, const Tensor& wi,
                                                            const Tensor& wo, const OptionalTensor& wg,
                                                            c10::string_view activation) {
  const Tensor grad = grad_.contiguous();
  const Segments segments("glam::expert_mlp", offsets, grad.size(0), wi.size(0));
  const Weights weights(wi, wo, wg, grad.scalar_type());
  return dispatch_accumulation(grad.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Hidden grad_hidden = backward_hidden<T>(outer_rows(grad), segments, {pre.contiguous(), pre_gate.contiguous()},
                                                  weights, activation_of(activation), nullptr, nullptr);
    const Tensor grad_rows = backward_rows<T>(segments, grad_hidden, weights);
    return std::tuple{grad_rows.to(grad.scalar_type()), grad_hidden.pre, grad_hidden.pre_gate};
  });
}

void expert_mlp_backward_weights(const Tensor& grad_, const Tensor& rows_, const OptionalTensor& offsets,
                                 const Tensor& pre, const Tensor& pre_gate, const Tensor& grad_pre,
                                 const Tensor& grad_pre_gate, c10::string_view activation, bool add,
                                 const Tensor& grad_wi, const Tensor& grad_wo, const Tensor& grad_wg) {
  const Tensor grad = grad_.contiguous(), rows = rows_.contiguous();
  const Segments segments("glam::expert_mlp", offsets, rows.size(0), grad_wi.size(0));
  dispatch_accumulation(rows.scalar_type(), [&](auto zero) {
    backward_weights<decltype(zero)>(outer_rows(grad), outer_rows(rows), segments,
                                     {pre.contiguous(), pre_gate.contiguous()},
                                     {grad_pre.contiguous(), grad_pre_gate.contiguous()}, activation_of(activation),
                                     nullptr, {grad_wi, grad_wo, grad_wg, add});
  });
}

// moe_mlp ---------------------------------------------------------------------------------------------------------

// The plan's indices, checked: a bad one would read outside x or the rows.
struct PlanView {
  Tensor row_of_choice, choice_of_row;
  int64_t num_tokens, num_choices, num_rows;

  PlanView(const Tensor& row_of_choice_, const Tensor& choice_of_row_)
      : row_of_choice(row_of_choice_.contiguous()),
        choice_of_row(choice_of_row_.contiguous()),
        num_tokens(row_of_choice.size(0)),
        num_choices(row_of_choice.size(1)),
        num_rows(choice_of_row.size(0)) {
    check_indices("glam::moe_mlp", "row_of_choice", row_of_choice, num_rows, -1);
    check_indices("glam::moe_mlp", "choice_of_row", choice_of_row, num_tokens * num_choices, -1);
  }
  const int32_t* rows() const { return row_of_choice.const_data_ptr<int32_t>(); }
  const int32_t* choices() const { return choice_of_row.const_data_ptr<int32_t>(); }
  Operand gather(const Tensor& tokens) const {
    Operand operand = outer_rows(tokens);
    operand.row_index = choices();
    operand.row_divisor = static_cast<int32_t>(num_choices);
    return operand;
  }
};

// rows are in the accumulation type T.
template <class T>
void combine(const Tensor& rows, const PlanView& plan, const T* gates, const Tensor& y) {
  dispatch_rows(y.scalar_type(), [&]<class Scalar>(const RowFunctions<Scalar>& functions, Scalar) {
    if constexpr (std::is_same_v<SumOf<Scalar>, T>) {
      at::parallel_for(0, plan.num_tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
        functions.combine_sums(rows.const_data_ptr<T>(), gates, plan.rows(), begin, end, plan.num_choices, y.size(1),
                               static_cast<Scalar*>(y.mutable_data_ptr()));
      });
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> moe_mlp_forward(const Tensor& x_, const Tensor& gates_, const Tensor& row_of_choice,
                                                   const Tensor& choice_of_row, const Tensor& offsets, const Tensor& wi,
                                                   const Tensor& wo, const OptionalTensor& wg,
                                                   c10::string_view activation) {
  const Tensor x = x_.contiguous(), gates = gates_.contiguous(), y = empty_large(x.sizes(), x.options());
  const PlanView plan(row_of_choice, choice_of_row);
  const Segments segments("glam::moe_mlp", offsets, plan.num_rows, wi.size(0));
  const Weights weights(wi, wo, wg, x.scalar_type());
  const Tensor out = empty_large({plan.num_rows, x.size(1)}, x.options().dtype(accumulation_dtype(x.scalar_type())));
  const Hidden hidden = dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Hidden result = forward<T>(plan.gather(x), x, segments, weights, activation_of(activation), out);
    combine<T>(out, plan, gates.const_data_ptr<T>(), y);
    return result;
  });
  return {y, hidden.pre, hidden.pre_gate};
}

std::tuple<Tensor, Tensor> moe_mlp_backward_into(const Tensor& grad_, const Tensor& x_, const Tensor& gates_,
                                                 const Tensor& row_of_choice, const Tensor& choice_of_row,
                                                 const Tensor& offsets, const Tensor& pre, const Tensor& pre_gate,
                                                 const Tensor& wi, const Tensor& wo, const OptionalTensor& wg,
                                                 c10::string_view activation, bool add, const Tensor& grad_wi,
                                                 const Tensor& grad_wo, const Tensor& grad_wg) {
  const Tensor grad = grad_.contiguous(), x = x_.contiguous(), gates = gates_.contiguous();
  const PlanView plan(row_of_choice, choice_of_row);
  const Segments segments("glam::moe_mlp", offsets, plan.num_rows, wi.size(0));
  const Weights weights(wi, wo, wg, x.scalar_type());
  const Tensor grad_x = empty_large(x.sizes(), x.options()), grad_gates = at::zeros_like(gates);
  dispatch_accumulation(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<T> row_gates(plan.num_rows), row_grad_gates(plan.num_rows);
    for (int64_t row = 0; row < plan.num_rows; ++row) {
      const int32_t choice = plan.choices()[row];
      row_gates[row] = choice < 0 ? T(0) : gates.const_data_ptr<T>()[choice];
    }
    const Hidden hidden = {pre.contiguous(), pre_gate.contiguous()};
    const Transform transform = activation_of(activation);
    const Hidden grad_hidden = backward_hidden<T>(plan.gather(grad), segments, hidden, weights, transform,
                                                  row_gates.data(), row_grad_gates.data());
    for (int64_t row = 0; row < segments.used(); ++row) {
      const int32_t choice = plan.choices()[row];
      if (choice >= 0) grad_gates.mutable_data_ptr<T>()[choice] = row_grad_gates[row];
    }
    combine<T>(backward_rows<T>(segments, grad_hidden, weights), plan, nullptr, grad_x);
    backward_weights<T>(plan.gather(grad), plan.gather(x), segments, hidden, grad_hidden, transform, row_gates.data(),
                        {grad_wi, grad_wo, grad_wg, add});
  });
  return {grad_x, grad_gates};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("_expert_mlp_forward", expert_mlp_forward);
  m.impl("_expert_mlp_backward_rows", expert_mlp_backward_rows);
  m.impl("_expert_mlp_backward_weights", expert_mlp_backward_weights);
  m.impl("_moe_mlp_forward", moe_mlp_forward);
  m.impl("_moe_mlp_backward_into", moe_mlp_backward_into);
}

}  // namespace glam::cpu
