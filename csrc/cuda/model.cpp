// CUDA kernels of glam::ordered_sum and glam::router_statistics.

#include "cuda/kernels/model.h"

#include <ATen/ops/empty.h>

#include "cuda/common.h"

namespace glam::cuda {
namespace {

Tensor sum(const Tensor& x_) {
  check_floating("glam::ordered_sum", "x", x_);
  const OnDevice device(x_);
  const Tensor x = x_.contiguous(), out = at::empty({}, x.options());
  const Tensor partial = at::empty({kSumPartials}, x.options().dtype(at::kDouble));
  ordered_sum(data(x), type_of(x), x.numel(), partial.mutable_data_ptr<double>(), mutable_data(out), device.stream());
  return out;
}

Tensor statistics(const Tensor& expert_ids, const Tensor& positions, int64_t num_experts) {
  constexpr auto op = "glam::router_statistics";
  check_dtype(op, "expert_ids", expert_ids, at::kInt);
  check_dtype(op, "positions", positions, at::kInt);
  check_shape(op, "expert_ids", expert_ids, "[T, 2]", {-1, 2});
  check_shape(op, "positions", positions, "[T, 2]", {expert_ids.sym_size(0), 2});
  const OnDevice device(expert_ids);
  const Tensor ids_T2 = expert_ids.contiguous(), positions_T2 = positions.contiguous();
  const Tensor counts = at::empty({num_experts + 6}, expert_ids.options().dtype(at::kLong));
  router_statistics(indices(ids_T2), indices(positions_T2), ids_T2.size(0), num_experts,
                    counts.mutable_data_ptr<int64_t>(), device.stream());
  return counts;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("ordered_sum", sum);
  m.impl("router_statistics", statistics);
}

}  // namespace glam::cuda
