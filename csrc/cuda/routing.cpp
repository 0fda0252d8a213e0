// routing_plan, dispatch and combine on CUDA tensors (kernels/routing.h). A plan's indices stay unread on the host:
// what is out of range counts as no row (kernels/routing.h).

#include "ops/routing.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "cuda/common.h"
#include "cuda/kernels/routing.h"

namespace glam::cuda {
namespace {

constexpr auto kPlan = "glam::routing_plan";
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

std::tuple<Tensor, Tensor, Tensor> routing_plan(const Tensor& expert_ids, const Tensor& positions_, int64_t num_experts,
                                                int64_t group_size, int64_t slots) {
  checks::routing_plan(expert_ids, positions_, num_experts, slots);
  const int64_t T = expert_ids.size(0), K = expert_ids.size(1), E = num_experts;
  const int64_t G = checks::num_groups(kPlan, T, group_size).expect_int();
  const bool tight = slots == -1;
  TORCH_CHECK(T <= kMaxRows / K && (tight || slots <= kMaxRows / E / std::max<int64_t>(1, G)), kPlan,
              ": expected rows and choices to number less than 2^31, got T = ", T, ", K = ", K, ", E = ", E,
              ", G = ", G, ", slots = ", slots);
  TORCH_CHECK(!tight || E <= kMostSortedExperts, kPlan, ": expected at most ", kMostSortedExperts,
              " experts on CUDA, got ", E);
  const Tensor ids = expert_ids.contiguous(), positions = positions_.contiguous();
  const OnDevice device(ids);
  const auto options = ids.options();
  const Tensor row_of_choice = at::empty({T, K}, options), offsets = at::empty({E + 1}, options);
  const Tensor choice_of_row = at::empty({tight ? T * K : E * G * slots}, options);
  auto* const rows = row_of_choice.mutable_data_ptr<int32_t>();
  auto* const choices = choice_of_row.mutable_data_ptr<int32_t>();
  if (tight) {
    const Tensor counts = at::empty({(T * K + kSortChunk - 1) / kSortChunk, E}, options);
    tight_plan(indices(ids), indices(positions), T * K, E, counts.mutable_data_ptr<int32_t>(), rows, choices,
               offsets.mutable_data_ptr<int32_t>(), device.stream());
  } else {
    slotted_plan(indices(ids), indices(positions), T * K, E, G, slots, G ? T / G * K : 1, rows, choices,
                 offsets.mutable_data_ptr<int32_t>(), device.stream());
  }
  return {row_of_choice, choice_of_row, offsets};
}

Tensor dispatch_rows(const Tensor& x_, const Tensor& row_of_choice, const Tensor& choice_of_row_,
                     const Tensor& offsets) {
  checks::dispatch(x_, row_of_choice, choice_of_row_, offsets);
  const Tensor x = x_.contiguous(), choice_of_row = choice_of_row_.contiguous();
  const OnDevice device(x);
  Tensor rows = at::empty({choice_of_row.size(0), x.size(1)}, x.options());
  dispatch(data(x), type_of(x), indices(choice_of_row), x.size(0), row_of_choice.size(1), rows.size(0), x.size(1),
           mutable_data(rows), device.stream());
  return rows;
}

// y[t] = sum over k of gate * row; without gates they are 1.
Tensor gather_sum(const Tensor& rows_, const OptionalTensor& gates_, const Tensor& row_of_choice_) {
  const Tensor rows = rows_.contiguous(), row_of_choice = row_of_choice_.contiguous();
  const Tensor gates = gates_ ? gates_->contiguous() : Tensor();
  const OnDevice device(rows);
  Tensor y = at::empty({row_of_choice.size(0), rows.size(1)}, rows.options());
  combine(data(rows), type_of(rows), data(gates), indices(row_of_choice), y.size(0), row_of_choice.size(1),
          rows.size(0), y.size(1), mutable_data(y), type_of(y), device.stream());
  return y;
}

Tensor dispatch_rows_backward(const Tensor& grad_rows, const Tensor& row_of_choice, const Tensor& choice_of_row,
                              const Tensor& offsets) {
  checks::dispatch_backward(grad_rows, row_of_choice, choice_of_row, offsets);
  return gather_sum(grad_rows, std::nullopt, row_of_choice);
}

Tensor combine_rows(const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
                    const Tensor& offsets) {
  checks::combine("glam::combine", rows, gates, row_of_choice, choice_of_row, offsets);
  return gather_sum(rows, gates, row_of_choice);
}

std::tuple<Tensor, Tensor> combine_rows_backward(const Tensor& grad_y_, const Tensor& rows_, const Tensor& gates_,
                                                 const Tensor& row_of_choice, const Tensor& choice_of_row_,
                                                 const Tensor& offsets) {
  checks::combine_backward(grad_y_, rows_, gates_, row_of_choice, choice_of_row_, offsets);
  const Tensor grad_y = grad_y_.contiguous(), rows = rows_.contiguous(), gates = gates_.contiguous();
  const Tensor choice_of_row = choice_of_row_.contiguous();
  const OnDevice device(rows);
  Tensor grad_rows = at::empty(rows.sizes(), rows.options()), grad_gates = at::zeros(gates.sizes(), gates.options());
  combine_backward(data(grad_y), data(rows), type_of(rows), data(gates), indices(choice_of_row), gates.size(0),
                   gates.size(1), rows.size(0), rows.size(1), mutable_data(grad_rows), mutable_data(grad_gates),
                   device.stream());
  return {grad_rows, grad_gates};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("routing_plan", routing_plan);
  m.impl("dispatch", dispatch_rows);
  m.impl("_dispatch_backward", dispatch_rows_backward);
  m.impl("combine", combine_rows);
  m.impl("_combine_backward", combine_rows_backward);
}

}  // namespace glam::cuda
