// The global gradient norm, the non-finite flag and clipping.

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include "glam/ops.h"
#include "glam/optim.h"
#include "optim/group_sums.h"

namespace glam::optim {

GradientStatistics gradient_statistics(const NamedTensors& parameters, const Shards& shards) {
  TORCH_CHECK(!parameters.empty(), "glam::optim::gradient_statistics: expected at least one parameter, got none");
  const at::NoGradGuard no_grad;
  const auto options = parameters[0].second.options().dtype(at::kDouble).requires_grad(false);
  // By the groups that share a parameter, one set of groups behind the other.
  std::map<std::vector<std::string>, std::vector<at::Tensor>> by_groups;
  for (const auto& [name, parameter] : parameters) {
    if (!parameter.grad().defined()) continue;
    std::vector<std::string> groups;
    if (const auto found = shards.find(name); found != shards.end()) {
      for (const Shard& shard : found->second) groups.push_back(shard.group);
    }
    by_groups[groups].push_back(parameter.grad());
  }
  std::vector<at::Tensor> grads;
  for (const auto& [groups, some] : by_groups) grads.insert(grads.end(), some.begin(), some.end());
  at::Tensor total = at::zeros({2}, options);
  if (grads.empty()) return {total[0], total[1] != 0};
  const auto [squares, bad] = squared_norm(grads);
  std::vector<GroupSum> sums;
  int64_t begin = 0;
  for (const auto& [groups, some] : by_groups) {
    const auto count = static_cast<int64_t>(some.size());
    const at::Tensor not_finite = bad.narrow(0, begin, count).any().to(at::kDouble);
    sums.push_back({at::stack({ordered_sum(squares.narrow(0, begin, count)), not_finite}), groups});
    begin += count;
  }
  sum_over_groups(sums);
  for (const auto& [part, groups] : sums) total = total + part;
  return {total[0].sqrt(), total[1] != 0};
}

void clip_gradients_(at::TensorList parameters, const at::Tensor& norm, double max_norm) {
  TORCH_CHECK(max_norm > 0, "glam::optim::clip_gradients_: expected max_norm > 0, got ", max_norm);
  const at::NoGradGuard no_grad;
  const at::Tensor factor = norm.reciprocal().mul(max_norm).clamp_max(1.);
  std::map<at::ScalarType, std::vector<at::Tensor>> by_dtype;
  for (const at::Tensor& parameter : parameters) {
    if (parameter.grad().defined()) by_dtype[parameter.grad().scalar_type()].push_back(parameter.grad());
  }
  for (const auto& [dtype, grads] : by_dtype) at::_foreach_mul_(grads, factor.to(dtype));
}

}  // namespace glam::optim
