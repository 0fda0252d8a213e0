// glam::optim::Adafactor: the three Adafactor ops over a list of parameters.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "glam/ops.h"
#include "glam/optim.h"

namespace glam::optim {

at::Tensor glam_schedule(const at::Tensor& step, double multiplier, int64_t constant_steps) {
  return step.clamp_min(constant_steps).to(at::kDouble).rsqrt().mul(multiplier);
}

Adafactor::Adafactor(const NamedTensors& parameters, AdafactorOptions options) : options_(options) {
  TORCH_CHECK(!parameters.empty(), "glam::optim::Adafactor: expected at least one parameter, got none");
  for (const auto& [name, weight] : parameters) {
    const auto dtype = weight.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, "glam::optim::Adafactor: expected ", name,
                " to be Float or Double, got ", dtype);
    const auto same = [&weight = weight](const Parameter& known) { return known.weight.is_same(weight); };
    if (std::any_of(parameters_.begin(), parameters_.end(), same)) continue;
    const auto sizes = weight.sizes();
    const bool factored = weight.dim() >= 2 && std::min(weight.size(-2), weight.size(-1)) >= options.min_factored;
    Parameter parameter{.name = name, .weight = weight, .row_var = {}, .col_var = {}};
    const auto state = weight.options().requires_grad(false);
    if (factored) {
      auto columns = sizes.vec();
      columns.erase(columns.end() - 2);
      parameter.row_var = at::zeros(sizes.slice(0, sizes.size() - 1), state);
      parameter.col_var = at::zeros(columns, state);
    } else {
      parameter.row_var = at::zeros(sizes, state);
    }
    parameters_.push_back(std::move(parameter));
  }
  step_count_ = at::zeros({}, parameters.front().second.options().dtype(at::kLong).requires_grad(false));
}

void Adafactor::step(const std::optional<at::Tensor>& learning_rate, const std::optional<at::Tensor>& skip) {
  const at::NoGradGuard no_grad;
  const at::Tensor lr = learning_rate ? *learning_rate : glam_schedule(step_count_);
  for (Parameter& parameter : parameters_) {
    const at::Tensor& grad = parameter.weight.grad();
    if (!grad.defined()) continue;
    const bool factored = parameter.col_var.has_value();
    const int64_t rows = factored ? grad.size(-2) : 1, columns = factored ? grad.size(-1) : 1;
    const auto [row_sums, col_sums, weight_squares] = adafactor_sums(grad, parameter.weight, factored);
    const auto [row_totals, scaled_squares] =
        adafactor_stats_(parameter.row_var, parameter.col_var, grad, row_sums, col_sums, step_count_, skip, rows,
                         columns, options_.decay, options_.eps);
    const at::Tensor row_means = row_totals / rows;
    adafactor_apply_(parameter.weight, grad, parameter.row_var, parameter.col_var, row_means, weight_squares,
                     (row_means * scaled_squares).sum(), lr, skip, grad.numel(), options_.clipping, options_.min_scale);
  }
  if (skip) {
    step_count_.add_(skip->logical_not());
  } else {
    step_count_.add_(1);
  }
}

void Adafactor::zero_grad() {
  for (Parameter& parameter : parameters_) parameter.weight.mutable_grad().reset();
}

NamedTensors Adafactor::named_state() const {
  NamedTensors state;
  for (const Parameter& parameter : parameters_) {
    if (parameter.col_var) {
      state.emplace_back(parameter.name + ".row_var", parameter.row_var);
      state.emplace_back(parameter.name + ".col_var", *parameter.col_var);
    } else {
      state.emplace_back(parameter.name + ".variance", parameter.row_var);
    }
  }
  state.emplace_back("step", step_count_);
  return state;
}

}  // namespace glam::optim
