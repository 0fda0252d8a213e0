#include "distributed/collectives.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

namespace glam::collectives {
namespace {

// Two methods of ProcessGroup were renamed in torch 2.13; templates, so that only the name that exists is compiled.
template <class Group>
auto all_to_all_of(Group& group, Tensor& out, Tensor& in, std::vector<int64_t>& out_splits,
                   std::vector<int64_t>& in_splits) {
  if constexpr (requires { group.all_to_all_single(out, in, out_splits, in_splits); }) {
    return group.all_to_all_single(out, in, out_splits, in_splits);
  } else {
    return group.alltoall_base(out, in, out_splits, in_splits);
  }
}
template <class Group>
auto all_gather_of(Group& group, Tensor& out, Tensor& in) {
  if constexpr (requires { group.all_gather_single(out, in); }) {
    return group.all_gather_single(out, in);
  } else {
    return group._allgather_base(out, in);
  }
}

c10::intrusive_ptr<c10d::Work> start_reduction(const Tensor& tensor, c10d::ReduceOp::RedOpType operation,
                                               const std::string& group) {
  std::vector<Tensor> tensors = {tensor};
  c10d::AllreduceOptions options;
  options.reduceOp = operation;
  return c10d::resolve_process_group(group)->allreduce(tensors, options);
}

}  // namespace

int64_t group_size(const std::string& group) {
  return group.empty() ? 1 : c10d::resolve_process_group(group)->getSize();
}

int64_t group_rank(const std::string& group) {
  return group.empty() ? 0 : c10d::resolve_process_group(group)->getRank();
}

void Pending::wait() {
  if (work_) work_->wait();
  work_.reset();
  tensors_.clear();
}

Pending start_all_to_all(const Tensor& out, const Tensor& in, std::span<const int64_t> out_splits,
                         std::span<const int64_t> in_splits, const std::string& group) {
  if (group.empty()) {
    out.copy_(in);
    return {};
  }
  Tensor to = out, from = in;
  std::vector<int64_t> received(out_splits.begin(), out_splits.end()), sent(in_splits.begin(), in_splits.end());
  return {all_to_all_of(*c10d::resolve_process_group(group), to, from, received, sent), {to, from}};
}

Pending start_all_reduce(const Tensor& tensor, const std::string& group) {
  if (group.empty()) return {};
  return {start_reduction(tensor, c10d::ReduceOp::SUM, group), {tensor}};
}

Tensor all_reduce(const Tensor& tensor, const std::string& operation, const std::string& group) {
  TORCH_CHECK(operation == "sum" || operation == "max", "glam::all_reduce: expected sum or max, got ", operation);
  const Tensor result = tensor.clone(at::MemoryFormat::Contiguous);
  if (!group.empty())
    start_reduction(result, operation == "sum" ? c10d::ReduceOp::SUM : c10d::ReduceOp::MAX, group)->wait();
  return result;
}

Tensor all_gather(const Tensor& tensor, const std::string& group) {
  Tensor in = tensor.contiguous();
  if (group.empty()) return in.unsqueeze(0).clone();
  auto sizes = in.sizes().vec();
  sizes.insert(sizes.begin(), group_size(group));
  Tensor out = at::empty(sizes, in.options()), flat = out.view({-1});
  in = in.view({-1});
  all_gather_of(*c10d::resolve_process_group(group), flat, in)->wait();
  return out;
}

}  // namespace glam::collectives
