// glam::optim::Adafactor: the Adafactor ops over all parameters at once.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <map>

#include "glam/ops.h"
#include "glam/optim.h"
#include "optim/group_sums.h"

namespace glam::optim {

at::Tensor glam_schedule(const at::Tensor& step, double multiplier, int64_t constant_steps) {
  return step.clamp_min(constant_steps).to(at::kDouble).rsqrt().mul(multiplier);
}

Adafactor::Adafactor(const NamedTensors& parameters, AdafactorOptions options, const Shards& shards)
    : options_(options) {
  TORCH_CHECK(!parameters.empty(), "glam::optim::Adafactor: expected at least one parameter, got none");
  for (const auto& [name, weight] : parameters) {
    const auto dtype = weight.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble, "glam::optim::Adafactor: expected ", name,
                " to be Float or Double, got ", dtype);
    const auto same = [&weight = weight](const Parameter& known) { return known.weight.is_same(weight); };
    if (std::any_of(parameters_.begin(), parameters_.end(), same)) continue;
    Parameter parameter;
    parameter.name = name;
    parameter.weight = weight;
    parameter.sizes = weight.sizes().vec();
    const auto found = shards.find(name);
    const std::vector<Shard> parts = found == shards.end() ? std::vector<Shard>() : found->second;
    for (const Shard& shard : parts) parameter.sizes.at(weight.dim() + shard.dim) = shard.size;
    const auto& whole = parameter.sizes;
    parameter.factored = weight.dim() >= 2 && std::min(whole.end()[-2], whole.end()[-1]) >= options.min_factored;
    for (const Shard& shard : parts) {
      const bool by_row = parameter.factored && shard.dim == -2, by_column = parameter.factored && shard.dim == -1;
      parameter.groups.push_back(shard.group);
      (by_row || by_column ? parameter.by_either : parameter.by_matrix).push_back(shard.group);
      if (by_row) parameter.by_row.push_back(shard.group);
      if (by_column) parameter.by_column.push_back(shard.group);
    }
    const auto sizes = weight.sizes();
    const auto state = weight.options().requires_grad(false);
    if (parameter.factored) {
      auto columns = sizes.vec();
      columns.erase(columns.end() - 2);
      parameter.row_var = at::zeros(sizes.slice(0, sizes.size() - 1), state);
      parameter.col_var = at::zeros(columns, state);
    } else {
      parameter.row_var = at::zeros(sizes, state);
      parameter.col_var = at::zeros({0}, state);
    }
    parameters_.push_back(std::move(parameter));
  }
  step_count_ = at::zeros({}, parameters.front().second.options().dtype(at::kLong).requires_grad(false));
}

void Adafactor::step(const std::optional<at::Tensor>& learning_rate, const std::optional<at::Tensor>& skip) {
  const at::NoGradGuard no_grad;
  const at::Tensor lr = learning_rate ? *learning_rate : glam_schedule(step_count_);
  std::map<at::ScalarType, std::vector<Parameter*>> by_dtype;  // as the ops take them
  for (Parameter& parameter : parameters_) {
    if (parameter.weight.grad().defined()) by_dtype[parameter.weight.scalar_type()].push_back(&parameter);
  }
  for (const auto& [dtype, parameters] : by_dtype) update(parameters, lr, skip);
  if (skip) {
    step_count_.add_(skip->logical_not());
  } else {
    step_count_.add_(1);
  }
}

// Pass by pass over all parameters; between the passes the sums over shards travel together.
void Adafactor::update(const std::vector<Parameter*>& parameters, const at::Tensor& learning_rate,
                       const std::optional<at::Tensor>& skip) {
  const auto one = [](const Parameter&) { return int64_t{1}; };
  const auto rows = [](const Parameter& parameter) { return parameter.factored ? parameter.row_var.numel() : 0; };
  const auto columns = [](const Parameter& parameter) { return parameter.col_var.numel(); };
  const auto matrices = [](const Parameter& parameter) {
    const auto sizes = parameter.weight.sizes();
    return parameter.factored ? c10::multiply_integers(sizes.slice(0, sizes.size() - 2)) : int64_t{1};
  };
  std::vector<at::Tensor> weights, grads, row_vars, col_vars;
  std::vector<bool> factored;
  std::vector<c10::SymInt> num_rows, num_columns, num_elements, num_matrices;
  for (const Parameter* parameter : parameters) {
    const auto& whole = parameter->sizes;
    weights.push_back(parameter->weight);
    grads.push_back(parameter->weight.grad());
    row_vars.push_back(parameter->row_var);
    col_vars.push_back(parameter->col_var);
    factored.push_back(parameter->factored);
    num_rows.emplace_back(parameter->factored ? whole.end()[-2] : 1);
    num_columns.emplace_back(parameter->factored ? whole.end()[-1] : 1);
    num_elements.emplace_back(c10::multiply_integers(whole));
    num_matrices.emplace_back(matrices(*parameter));
  }
  // A parameter's part of what an op returns for all, `length` long, to be summed over the groups.
  std::vector<GroupSum> sums;
  const auto add_parts = [&](const at::Tensor& all, const Groups Parameter::* groups, auto&& length_of) {
    int64_t begin = 0;
    for (const Parameter* parameter : parameters) {
      const int64_t length = length_of(*parameter);
      if (!(parameter->*groups).empty()) sums.push_back({all.narrow(0, begin, length), parameter->*groups});
      begin += length;
    }
  };
  const auto sum_parts = [&] {
    sum_over_groups(sums);
    sums.clear();
  };
  const auto [row_sums, col_sums, weight_squares] = adafactor_sums(grads, weights, factored);
  add_parts(weight_squares, &Parameter::groups, one);
  add_parts(row_sums, &Parameter::by_column, rows);
  add_parts(col_sums, &Parameter::by_row, columns);
  sum_parts();
  const auto [row_means, scaled_squares] = adafactor_stats_(row_vars, col_vars, grads, row_sums, col_sums, step_count_,
                                                            skip, num_rows, num_columns, options_.decay, options_.eps);
  add_parts(scaled_squares, &Parameter::by_either, matrices);
  add_parts(row_means, &Parameter::by_row, matrices);
  sum_parts();
  const at::Tensor update_squares = adafactor_update_squares(row_means, scaled_squares, num_matrices);
  add_parts(update_squares, &Parameter::by_matrix, one);
  sum_parts();
  adafactor_apply_(weights, grads, row_vars, col_vars, row_means, weight_squares, update_squares, learning_rate, skip,
                   num_elements, options_.clipping, options_.min_scale);
}

void Adafactor::zero_grad() {
  for (Parameter& parameter : parameters_) parameter.weight.mutable_grad().reset();
}

NamedTensors Adafactor::named_state() const {
  NamedTensors state;
  for (const Parameter& parameter : parameters_) {
    if (parameter.factored) {
      state.emplace_back(parameter.name + ".row_var", parameter.row_var);
      state.emplace_back(parameter.name + ".col_var", parameter.col_var);
    } else {
      state.emplace_back(parameter.name + ".variance", parameter.row_var);
    }
  }
  state.emplace_back("step", step_count_);
  return state;
}

}  // namespace glam::optim
