// CPU kernels of routing_plan, dispatch and combine. Letters and formulas: ops/routing.cpp.
//
// The tight plan is a stable counting sort over threads: each worker counts the experts of its own stretch of choices, a
// prefix sum over (expert, worker) gives every worker its first row of every expert, and each fills in its stretch. A
// stable order has one outcome, so the number of workers does not show. The row loops are in kernels/rows.cpp.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/indices.h"
#include "cpu/row_functions.h"
#include "ops/large_memory.h"
#include "ops/routing.h"

namespace glam::cpu {
namespace {

constexpr auto kPlan = "glam::routing_plan";
constexpr int64_t kSortGrain = 2048;  // choices that justify a worker
constexpr int64_t kRowGrain = 32768;  // elements of rows that justify a thread

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();

int64_t row_grain(int64_t D) { return std::max<int64_t>(1, kRowGrain / std::max<int64_t>(1, D)); }

void tight_plan(const int32_t* ids, const int32_t* positions, int64_t choices, int64_t E, int32_t* row_of_choice,
                int32_t* choice_of_row, int32_t* offsets_E1) {
  const int64_t workers = std::clamp<int64_t>(choices / kSortGrain, 1, std::max<int64_t>(1, at::get_num_threads()));
  const int64_t stretch = (choices + workers - 1) / workers;
  std::vector<int32_t> next(workers * E, 0);  // [worker, expert]: first counts, then the next row to fill
  const auto for_each_choice = [&](const auto& body) {
    at::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t worker = first; worker < last; ++worker) {
        const int64_t end = std::min((worker + 1) * stretch, choices);
        for (int64_t choice = worker * stretch; choice < end; ++choice) body(next.data() + worker * E, choice);
      }
    });
  };

  for_each_choice([&](int32_t* count_E, int64_t choice) {
    if (positions[choice] >= 0) ++count_E[ids[choice]];
  });
  int32_t row = 0;
  for (int64_t e = 0; e < E; ++e) {
    offsets_E1[e] = row;
    for (int64_t worker = 0; worker < workers; ++worker) {
      const int32_t count = next[worker * E + e];
      next[worker * E + e] = row;
      row += count;
    }
  }
  offsets_E1[E] = row;
  for_each_choice([&](int32_t* next_E, int64_t choice) {
    row_of_choice[choice] = positions[choice] >= 0 ? next_E[ids[choice]]++ : -1;
    if (row_of_choice[choice] >= 0) choice_of_row[row_of_choice[choice]] = static_cast<int32_t>(choice);
  });
  std::fill(choice_of_row + row, choice_of_row + choices, -1);
}

struct Slots {
  int64_t G;
  int64_t group_choices;  // choices of one group
  int64_t C;
};

// Groups own disjoint rows, so each is filled by one thread, which also sees a slot that is taken twice.
void slotted_plan(const int32_t* ids, const int32_t* positions, const Slots& slots, int32_t* row_of_choice,
                  int32_t* choice_of_row) {
  at::parallel_for(0, slots.G, 1, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      for (int64_t i = group * slots.group_choices; i < (group + 1) * slots.group_choices; ++i) {
        if (positions[i] < 0) {
          row_of_choice[i] = -1;
          continue;
        }
        TORCH_CHECK(positions[i] < slots.C, kPlan, ": expected positions to be below slots = ", slots.C, ", got ",
                    positions[i]);
        const int64_t row = (ids[i] * slots.G + group) * slots.C + positions[i];
        TORCH_CHECK(choice_of_row[row] < 0, kPlan, ": expected positions to differ within an expert and group, got ",
                    positions[i], " twice for expert ", ids[i], " in group ", group);
        row_of_choice[i] = static_cast<int32_t>(row);
        choice_of_row[row] = static_cast<int32_t>(i);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> routing_plan(const Tensor& expert_ids, const Tensor& positions_, int64_t num_experts,
                                                int64_t group_size, int64_t slots) {
  checks::routing_plan(expert_ids, positions_, num_experts, slots);
  const int64_t T = expert_ids.size(0), K = expert_ids.size(1), E = num_experts;
  const int64_t G = checks::num_groups(kPlan, T, group_size).expect_int();
  const bool tight = slots == -1;
  TORCH_CHECK(T <= kMaxRows / K && (tight || slots <= kMaxRows / E / std::max<int64_t>(1, G)), kPlan,
              ": expected rows and choices to number less than 2^31, got T = ", T, ", K = ", K, ", E = ", E,
              ", G = ", G, ", slots = ", slots);
  const Tensor ids = expert_ids.contiguous(), positions = positions_.contiguous();
  check_indices(kPlan, "expert_ids", ids, E);

  const auto options = ids.options();
  Tensor row_of_choice = at::empty({T, K}, options), offsets = at::empty({E + 1}, options);
  auto* const offsets_E1 = offsets.mutable_data_ptr<int32_t>();
  if (tight) {
    Tensor choice_of_row = at::empty({T * K}, options);
    tight_plan(ids.const_data_ptr<int32_t>(), positions.const_data_ptr<int32_t>(), T * K, E,
               row_of_choice.mutable_data_ptr<int32_t>(), choice_of_row.mutable_data_ptr<int32_t>(), offsets_E1);
    return {row_of_choice, choice_of_row, offsets};
  }
  Tensor choice_of_row = at::full({E * G * slots}, -1, options);
  for (int64_t e = 0; e <= E; ++e) offsets_E1[e] = static_cast<int32_t>(e * G * slots);
  slotted_plan(ids.const_data_ptr<int32_t>(), positions.const_data_ptr<int32_t>(),
               {.G = G, .group_choices = G ? T / G * K : 0, .C = slots}, row_of_choice.mutable_data_ptr<int32_t>(),
               choice_of_row.mutable_data_ptr<int32_t>());
  return {row_of_choice, choice_of_row, offsets};
}

// A plan's map with every index in range; -1 means none.
Tensor checked_map(const char* op, const char* name, const Tensor& map, int64_t limit) {
  const Tensor contiguous = map.contiguous();
  check_indices(op, name, contiguous, limit, -1);
  return contiguous;
}

Tensor dispatch(const Tensor& x_, const Tensor& row_of_choice, const Tensor& choice_of_row_, const Tensor& offsets) {
  checks::dispatch(x_, row_of_choice, choice_of_row_, offsets);
  const int64_t D = x_.size(1), K = row_of_choice.size(1), R = choice_of_row_.size(0);
  const Tensor x = x_.contiguous();
  const Tensor choice_of_row = checked_map("glam::dispatch", "choice_of_row", choice_of_row_, row_of_choice.numel());
  const Tensor rows = empty_large({R, D}, x.options());
  if (rows.numel() == 0) return rows;
  const auto* const choice_of_row_R = choice_of_row.const_data_ptr<int32_t>();
  const int64_t row_bytes = D * x.element_size();
  const auto* const from = static_cast<const char*>(x.const_data_ptr());
  auto* const to = static_cast<char*>(rows.mutable_data_ptr());
  at::parallel_for(0, R, row_grain(D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (choice_of_row_R[r] < 0) {
        std::memset(to + r * row_bytes, 0, row_bytes);
      } else {
        std::memcpy(to + r * row_bytes, from + choice_of_row_R[r] / K * row_bytes, row_bytes);
      }
    }
  });
  return rows;
}

template <class Scalar>
const Scalar* in(const Tensor& tensor) {
  return static_cast<const Scalar*>(tensor.const_data_ptr());
}
template <class Scalar>
Scalar* out(const Tensor& tensor) {
  return static_cast<Scalar*>(tensor.mutable_data_ptr());
}

// y[t] = sum over k of gate * row; without gates they are 1.
Tensor gather_sum(const char* op, const Tensor& rows_, const OptionalTensor& gates_, const Tensor& row_of_choice_) {
  const int64_t T = row_of_choice_.size(0), K = row_of_choice_.size(1), D = rows_.size(1);
  const Tensor rows = rows_.contiguous(), gates = gates_ ? gates_->contiguous() : Tensor();
  const Tensor row_of_choice = checked_map(op, "row_of_choice", row_of_choice_, rows.size(0));
  const Tensor y = empty_large({T, D}, rows.options());
  dispatch_rows(rows.scalar_type(), [&]<class Scalar>(const RowFunctions<Scalar>& functions, Scalar) {
    using Sum = SumOf<Scalar>;
    at::parallel_for(0, T, row_grain(D * K), [&](int64_t begin, int64_t end) {
      functions.combine(in<Scalar>(rows), gates.defined() ? in<Sum>(gates) : nullptr, in<int32_t>(row_of_choice), begin,
                        end, K, D, out<Scalar>(y));
    });
  });
  return y;
}

Tensor dispatch_backward(const Tensor& grad_rows, const Tensor& row_of_choice, const Tensor& choice_of_row,
                         const Tensor& offsets) {
  checks::dispatch_backward(grad_rows, row_of_choice, choice_of_row, offsets);
  return gather_sum("glam::_dispatch_backward", grad_rows, std::nullopt, row_of_choice);
}

Tensor combine(const Tensor& rows, const Tensor& gates, const Tensor& row_of_choice, const Tensor& choice_of_row,
               const Tensor& offsets) {
  checks::combine("glam::combine", rows, gates, row_of_choice, choice_of_row, offsets);
  return gather_sum("glam::combine", rows, gates, row_of_choice);
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& grad_y_, const Tensor& rows_, const Tensor& gates_,
                                            const Tensor& row_of_choice, const Tensor& choice_of_row_,
                                            const Tensor& offsets) {
  checks::combine_backward(grad_y_, rows_, gates_, row_of_choice, choice_of_row_, offsets);
  const int64_t D = rows_.size(1), K = gates_.size(1), R = rows_.size(0);
  const Tensor grad_y = grad_y_.contiguous(), rows = rows_.contiguous(), gates = gates_.contiguous();
  const Tensor choice_of_row =
      checked_map("glam::_combine_backward", "choice_of_row", choice_of_row_, row_of_choice.numel());
  const Tensor grad_rows = empty_large(rows.sizes(), rows.options());
  Tensor grad_gates = at::zeros(gates.sizes(), gates.options());
  dispatch_rows(rows.scalar_type(), [&]<class Scalar>(const RowFunctions<Scalar>& functions, Scalar) {
    using Sum = SumOf<Scalar>;
    at::parallel_for(0, R, row_grain(D), [&](int64_t begin, int64_t end) {
      functions.combine_backward(in<Scalar>(grad_y), in<Scalar>(rows), in<Sum>(gates), in<int32_t>(choice_of_row),
                                 begin, end, K, D, out<Scalar>(grad_rows), out<Sum>(grad_gates));
    });
  });
  return {grad_rows, grad_gates};
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("routing_plan", routing_plan);
  m.impl("dispatch", dispatch);
  m.impl("_dispatch_backward", dispatch_backward);
  m.impl("combine", combine);
  m.impl("_combine_backward", combine_backward);
}

}  // namespace glam::cpu
