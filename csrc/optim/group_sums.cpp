#include "optim/group_sums.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>

#include <map>

#include "glam/ops.h"

namespace glam::optim {

void sum_over_groups(const std::vector<GroupSum>& items) {
  std::map<std::pair<std::string, at::ScalarType>, std::vector<at::Tensor>> batches;
  for (const auto& [tensor, groups] : items) {
    for (const auto& group : groups) batches[{group, tensor.scalar_type()}].push_back(tensor);
  }
  for (const auto& [key, tensors] : batches) {
    std::vector<at::Tensor> flat;
    for (const auto& tensor : tensors) flat.push_back(tensor.flatten());
    const at::Tensor total = ordered_all_reduce(at::cat(flat), key.first);
    int64_t begin = 0;
    for (const auto& tensor : tensors) {
      tensor.copy_(total.narrow(0, begin, tensor.numel()).view(tensor.sizes()));
      begin += tensor.numel();
    }
  }
}

}  // namespace glam::optim
