// glam::optim::Adafactor: the three Adafactor ops over a list of parameters.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <tuple>

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
    Parameter parameter{
        .name = name, .weight = weight, .row_var = {}, .col_var = {}, .shards = {}, .sizes = weight.sizes().vec()};
    if (const auto found = shards.find(name); found != shards.end()) parameter.shards = found->second;
    for (const Shard& shard : parameter.shards) parameter.sizes.at(weight.dim() + shard.dim) = shard.size;
    const auto& whole = parameter.sizes;
    const bool factored = weight.dim() >= 2 && std::min(whole.end()[-2], whole.end()[-1]) >= options.min_factored;
    const auto sizes = weight.sizes();
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

namespace {

// A parameter in the middle of its update.
struct Update {
  at::Tensor grad, row_sums, col_sums, weight_squares, row_totals, scaled_squares, row_means, update_squares;
  int64_t num_rows, num_columns;             // of the whole, 1 and 1 if it is not factored
  std::vector<std::string> split_by_matrix;  // groups that split neither rows nor columns
  std::vector<std::string> split_by_row, split_by_column, split_by_either, split;
};

}  // namespace

// Pass by pass over all parameters, so that the sums over shards travel together.
void Adafactor::step(const std::optional<at::Tensor>& learning_rate, const std::optional<at::Tensor>& skip) {
  const at::NoGradGuard no_grad;
  const at::Tensor lr = learning_rate ? *learning_rate : glam_schedule(step_count_);
  std::vector<std::pair<Parameter*, Update>> updates;
  std::vector<GroupSum> sums;
  for (Parameter& parameter : parameters_) {
    if (!parameter.weight.grad().defined()) continue;
    const bool factored = parameter.col_var.has_value();
    Update update;
    update.grad = parameter.weight.grad();
    update.num_rows = factored ? parameter.sizes.end()[-2] : 1;
    update.num_columns = factored ? parameter.sizes.end()[-1] : 1;
    for (const Shard& shard : parameter.shards) {
      const bool by_row = factored && shard.dim == -2, by_column = factored && shard.dim == -1;
      if (by_row) update.split_by_row.push_back(shard.group);
      if (by_column) update.split_by_column.push_back(shard.group);
      (by_row || by_column ? update.split_by_either : update.split_by_matrix).push_back(shard.group);
      update.split.push_back(shard.group);
    }
    std::tie(update.row_sums, update.col_sums, update.weight_squares) =
        adafactor_sums(update.grad, parameter.weight, factored);
    sums.insert(sums.end(), {{update.weight_squares, update.split},
                             {update.row_sums, update.split_by_column},
                             {update.col_sums, update.split_by_row}});
    updates.emplace_back(&parameter, std::move(update));
  }
  sum_over_groups(sums);
  sums.clear();
  for (auto& [parameter, update] : updates) {
    std::tie(update.row_totals, update.scaled_squares) =
        adafactor_stats_(parameter->row_var, parameter->col_var, update.grad, update.row_sums, update.col_sums,
                         step_count_, skip, update.num_rows, update.num_columns, options_.decay, options_.eps);
    sums.insert(sums.end(),
                {{update.scaled_squares, update.split_by_either}, {update.row_totals, update.split_by_row}});
  }
  sum_over_groups(sums);
  sums.clear();
  for (auto& [parameter, update] : updates) {
    update.row_means = update.row_totals / update.num_rows;
    update.update_squares = (update.row_means * update.scaled_squares).sum();
    sums.push_back({update.update_squares, update.split_by_matrix});
  }
  sum_over_groups(sums);
  for (auto& [parameter, update] : updates) {
    adafactor_apply_(parameter->weight, update.grad, parameter->row_var, parameter->col_var, update.row_means,
                     update.weight_squares, update.update_squares, lr, skip, c10::multiply_integers(parameter->sizes),
                     options_.clipping, options_.min_scale);
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
