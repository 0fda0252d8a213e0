// CPU kernels of glam::embedding: rows are copied in parallel; the gradient sorts the positions by id (stable) and splits
// the columns over threads, so that a frequent id is everybody's work and every sum keeps its order.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/kernels/embedding.h"
#include "ops/checks.h"
#include "ops/large_memory.h"
#include "ops/packed_weight.h"

namespace glam::cpu {
namespace {

constexpr int64_t kElementsPerTask = 16384;
constexpr int64_t kColumnsPerTask = 32;  // a whole cache line of bfloat16

// Rows ids[begin, end) of a table [V, D] whose transpose is packed.
void unpack_rows(const Tensor& table, const int64_t* ids, int64_t begin, int64_t end, const Tensor& y) {
  const int64_t D = y.size(-1), strip_elements = table.size(1) * table.size(2);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t first = ids[t] / kStripColumns * strip_elements, column = ids[t] % kStripColumns;
    if (table.scalar_type() == at::kChar) {
      const auto* const strip = table.const_data_ptr<int8_t>() + first;
      const float scale = reinterpret_cast<const float*>(strip)[column];
      float* const out = y.mutable_data_ptr<float>() + t * D;
      for (int64_t d = 0; d < D; ++d) {
        out[d] = scale * static_cast<float>(strip[packed::int8_index(d, column)]);
      }
    } else {
      const auto* const strip = table.const_data_ptr<at::BFloat16>() + first;
      auto* const out = y.mutable_data_ptr<at::BFloat16>() + t * D;
      for (int64_t d = 0; d < D; ++d) out[d] = strip[packed::bf16_index(d, column)];
    }
  }
}

Tensor embedding(const Tensor& ids_, const Tensor& table_) {
  checks::embedding(ids_, table_);
  const bool is_packed = packed::is_packed(table_, 2);
  const Tensor ids = ids_.to(at::kLong).contiguous(), table = table_.contiguous();
  const int64_t V = packed::table_rows(table).expect_int(), T = ids.numel();
  const int64_t D = is_packed ? packed::depth(table).expect_int() : table.size(1);
  const auto* id = ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < T; ++t) {
    TORCH_CHECK(id[t] >= 0 && id[t] < V, "glam::embedding: expected ids in [0, V) with V = ", V, ", got ", id[t],
                " at ", t);
  }
  auto sizes = ids.sizes().vec();
  sizes.push_back(D);
  const auto dtype = is_packed ? packed::value_dtype(table) : table.scalar_type();
  const Tensor y = empty_large(sizes, table.options().dtype(dtype));
  if (y.numel() == 0) return y;
  if (is_packed) {
    at::parallel_for(0, T, 1, [&](int64_t begin, int64_t end) { unpack_rows(table, id, begin, end, y); });
    return y;
  }
  const size_t row_bytes = static_cast<size_t>(D) * table.element_size();
  const auto* const from = static_cast<const char*>(table.const_data_ptr());
  auto* const to = static_cast<char*>(y.mutable_data_ptr());
  at::parallel_for(0, T, std::max<int64_t>(kElementsPerTask / D, 1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) std::memcpy(to + t * row_bytes, from + id[t] * row_bytes, row_bytes);
  });
  return y;
}

void backward_into(const Tensor& grad_, const Tensor& ids_, const Tensor& grad_table) {
  const Tensor grad = grad_.contiguous(), ids = ids_.to(at::kLong).contiguous();
  const int64_t D = grad.size(-1), T = ids.numel();
  TORCH_CHECK(grad_table.is_contiguous() && grad_table.size(1) == D && grad_table.scalar_type() == grad.scalar_type(),
              "glam::_embedding_backward_into: expected grad_table to be contiguous [V, ", D, "] ", grad.scalar_type(),
              ", got ", grad_table.sizes(), " ", grad_table.scalar_type());
  if (grad.numel() == 0) return;
  const auto* id = ids.const_data_ptr<int64_t>();
  std::vector<int64_t> order(T), starts, used;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
  for (int64_t i = 0; i < T; ++i) {
    if (i > 0 && id[order[i]] == used.back()) continue;
    starts.push_back(i);
    used.push_back(id[order[i]]);
  }
  starts.push_back(T);
  const RowSums sums{.rows = grad.const_data_ptr(),
                     .out = grad_table.mutable_data_ptr(),
                     .type = type_of(grad),
                     .D = D,
                     .order = order.data(),
                     .starts = starts.data(),
                     .ids = used.data(),
                     .num_sums = static_cast<int64_t>(used.size())};
  const auto& functions = active_embedding_table();
  const int64_t num_tasks = (D + kColumnsPerTask - 1) / kColumnsPerTask;
  at::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    functions.add_rows(sums, begin * kColumnsPerTask, std::min(end * kColumnsPerTask, D));
  });
}

Tensor backward(const Tensor& grad, const Tensor& ids, int64_t num_rows) {
  const Tensor grad_table = empty_large({num_rows, grad.size(-1)}, grad.options()).zero_();
  backward_into(grad, ids, grad_table);
  return grad_table;
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, CPU, m) {
  m.impl("embedding", embedding);
  m.impl("_embedding_backward", backward);
  m.impl("_embedding_backward_into", backward_into);
}

}  // namespace glam::cpu
