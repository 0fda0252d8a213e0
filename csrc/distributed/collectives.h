// Collectives over process groups by name, reachable without Python. An empty name is the group of this one process:
// nothing is sent. A group is registered under its name by torch.distributed, or by c10d::register_process_group.
//
// Calls that start a transfer return at once; on a GPU `wait` makes the current stream wait, never the host.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>

#include <span>
#include <string>

#include "ops/common.h"

namespace glam::collectives {

// The number of ranks of a registered process group, and this process's place in it; 1 and 0 for "".
int64_t group_size(const std::string& group);
int64_t group_rank(const std::string& group);

// A transfer under way. It keeps its tensors alive; they may not be read or written before `wait`, which throws what
// went wrong.
class [[nodiscard]] Pending {
 public:
  Pending() = default;
  Pending(c10::intrusive_ptr<c10d::Work> work, std::vector<Tensor> tensors)
      : work_(std::move(work)), tensors_(std::move(tensors)) {}
  void wait();

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  std::vector<Tensor> tensors_;
};

// Rows of dim 0 of `in` to every rank and rows of `out` from every rank, both contiguous; splits count rows per rank
// and are in rank order.
Pending start_all_to_all(const Tensor& out, const Tensor& in, std::span<const int64_t> out_splits,
                         std::span<const int64_t> in_splits, const std::string& group);
// The elementwise sum over the group, in place in a contiguous tensor.
Pending start_all_reduce(const Tensor& tensor, const std::string& group);

// A new tensor with the elementwise "sum" or "max" over the group.
Tensor all_reduce(const Tensor& tensor, const std::string& operation, const std::string& group);
// A new tensor [P, ...] with the tensor of every rank.
Tensor all_gather(const Tensor& tensor, const std::string& group);

}  // namespace glam::collectives
