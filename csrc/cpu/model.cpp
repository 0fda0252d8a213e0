#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "ops/common.h"

namespace glam::cpu {
namespace {

Tensor ordered_sum(const Tensor& x_) {
  check_floating("glam::ordered_sum", "x", x_);
  const Tensor x = x_.contiguous(), sum = at::empty({}, x.options());
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "ordered_sum", [&] {
    const auto* const values = x.const_data_ptr<scalar_t>();
    double total = 0;
    for (int64_t i = 0; i < x.numel(); ++i) total += static_cast<double>(values[i]);
    *sum.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(total);
  });
  return sum;
}

Tensor router_statistics(const Tensor& expert_ids, const Tensor& positions, int64_t num_experts) {
  constexpr auto op = "glam::router_statistics";
  check_dtype(op, "expert_ids", expert_ids, at::kInt);
  check_dtype(op, "positions", positions, at::kInt);
  check_shape(op, "expert_ids", expert_ids, "[T, 2]", {-1, 2});
  check_shape(op, "positions", positions, "[T, 2]", {expert_ids.sym_size(0), 2});
  const Tensor ids_T2 = expert_ids.contiguous(), positions_T2 = positions.contiguous();
  const Tensor counts = at::zeros({num_experts + 6}, expert_ids.options().dtype(at::kLong));
  const auto* ids = ids_T2.const_data_ptr<int32_t>();
  const auto* slots = positions_T2.const_data_ptr<int32_t>();
  auto* const load_E = counts.mutable_data_ptr<int64_t>();
  auto* const over_capacity = load_E + num_experts;
  auto* const tokens_with_rows = over_capacity + 2;
  auto* const real_tokens = tokens_with_rows + 3;
  for (int64_t t = 0; t < ids_T2.size(0); ++t) {
    // Only padding has a first choice without a slot of its own accord.
    if (slots[2 * t] == -1) continue;
    int rows = 0;
    for (int k = 0; k < 2; ++k) {
      const int32_t slot = slots[2 * t + k], expert = ids[2 * t + k];
      TORCH_CHECK(expert >= 0 && expert < num_experts, op, ": expected expert_ids in [0, E) with E = ", num_experts,
                  ", got ", expert);
      if (slot == -2) ++over_capacity[k];
      if (slot < 0) continue;
      ++rows;
      ++load_E[expert];
    }
    ++tokens_with_rows[rows];
    ++*real_tokens;
  }
  return counts;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("ordered_sum", ordered_sum);
  m.impl("router_statistics", router_statistics);
}

}  // namespace glam::cpu
