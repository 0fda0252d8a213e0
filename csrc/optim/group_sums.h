// Sums over the ranks that hold the parts of parameters, many small tensors in one transfer.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

namespace glam::optim {

struct GroupSum {
  at::Tensor tensor;                // replaced by its sum over each of the groups
  std::vector<std::string> groups;  // names; none: it stays as it is
};

void sum_over_groups(const std::vector<GroupSum>& items);

}  // namespace glam::optim
