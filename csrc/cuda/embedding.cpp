// CUDA kernels of glam::embedding. The positions of the gradient are sorted by the library.
//
// Ids are not read on the host. Where the CPU kernel raises for an id outside [0, V), y has a row of NaN here, which
// the non-finite guard of training sees in the gradients, and the position adds nothing to the table's gradient.

#include "cuda/kernels/embedding.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "cuda/common.h"
#include "ops/checks.h"

namespace glam::cuda {
namespace {

Tensor forward(const Tensor& ids_, const Tensor& table_) {
  checks::embedding(ids_, table_);
  refuse_packed("glam::embedding", "table", "[V, D]", table_, 2);
  const OnDevice device(table_);
  const Tensor ids = ids_.to(at::kLong).contiguous(), table = table_.contiguous();
  auto sizes = ids.sizes().vec();
  sizes.push_back(table.size(1));
  const Tensor y = at::empty(sizes, table.options());
  if (y.numel() == 0) return y;
  embedding(ids.const_data_ptr<int64_t>(), data(table), type_of(table), ids.numel(), table.size(0), table.size(1),
            mutable_data(y), device.stream());
  return y;
}

void sum_into(const Tensor& grad_, const Tensor& ids_, bool add, const Tensor& grad_table) {
  const OnDevice device(grad_);
  const Tensor grad = grad_.contiguous();
  const int64_t D = grad.size(-1), T = ids_.numel();
  TORCH_CHECK(grad_table.is_contiguous() && grad_table.size(1) == D && grad_table.scalar_type() == grad.scalar_type(),
              "glam::_embedding_backward_into: expected grad_table to be contiguous [V, ", D, "] ", grad.scalar_type(),
              ", got ", grad_table.sizes(), " ", grad_table.scalar_type());
  if (grad.numel() == 0) return;
  // A stable sort: equal ids keep their positions' order.
  const auto [sorted_ids, order] = at::sort(ids_.to(at::kLong).reshape(-1), std::optional<bool>(true));
  const auto sums = grad.options().dtype(accumulation_dtype(grad.scalar_type()));
  const Tensor partial = at::empty({embedding_partial_size(T, D)}, sums);
  embedding_backward(data(grad), type_of(grad), sorted_ids.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(),
                     T, grad_table.size(0), D, mutable_data(partial), add, mutable_data(grad_table), device.stream());
}

Tensor backward(const Tensor& grad, const Tensor& ids, int64_t num_rows) {
  const Tensor grad_table = at::zeros({num_rows, grad.size(-1)}, grad.options());
  sum_into(grad, ids, false, grad_table);
  return grad_table;
}

void backward_into(const Tensor& grad, const Tensor& ids, const Tensor& grad_table) {
  sum_into(grad, ids, true, grad_table);
}

}  // namespace

TORCH_LIBRARY_IMPL(glam, GLAM_CUDA_KEY, m) {
  m.impl("embedding", forward);
  m.impl("_embedding_backward", backward);
  m.impl("_embedding_backward_into", backward_into);
}

}  // namespace glam::cuda
