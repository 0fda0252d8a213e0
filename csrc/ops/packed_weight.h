// Weights packed for inference: an op takes one wherever it takes the plain weight, [K, N] or [E, K, N], and knows it by
// its additional dimension. Layout: ops/packed_layout.h, cpu/kernels/stored.h.
//   bfloat16 [..., N / 32, K / 2, 64]
//   int8     [..., N / 32, 4 + K, 32]: each strip of columns begins with its float32 scales
#pragma once

#include "ops/common.h"
#include "ops/packed_layout.h"

namespace glam::packed {

// Whether this weight, which would have `plain_dim` dimensions, is packed.
inline bool is_packed(const Tensor& weight, int64_t plain_dim) { return weight.dim() == plain_dim + 1; }

// K and N of a packed weight.
SymInt depth(const Tensor& weight);
SymInt columns(const Tensor& weight);

// The last size of a weight of plain_dim dimensions, packed or not.
SymInt columns(const Tensor& weight, int64_t plain_dim);
// V of a table [V, D], plain or packed from its transpose.
SymInt table_rows(const Tensor& table);

// Of the numbers that a packed weight stands for.
inline at::ScalarType value_dtype(const Tensor& weight) {
  return weight.scalar_type() == at::kChar ? at::kFloat : at::kBFloat16;
}

// Where a strip has (k, column), in elements.
inline int64_t bf16_index(int64_t k, int64_t column) { return k / 2 * 2 * kStripColumns + 2 * column + k % 2; }
inline int64_t int8_index(int64_t k, int64_t column) { return (kScaleRows + k) * kStripColumns + column; }

// Checks a weight that meets x: of the plain `shape` (-1: any size) and a dtype that x may meet, or packed from such a one.
void check_weight(const char* op, const char* name, const Tensor& weight, const char* letters,
                  const std::vector<SymInt>& shape, const Tensor& x);

// Of pack_weight and unpack_weight: checked sizes and dtypes.
struct Shape {
  std::vector<SymInt> sizes;
  at::ScalarType dtype;
};
Shape packed_shape(const Tensor& weight, at::ScalarType dtype);
Shape unpacked_shape(const Tensor& packed);

// Raises if gradients are being recorded and one of `tensors` wants one: a packed weight has no backward pass.
void refuse_gradients(const char* op, at::TensorList tensors);

}  // namespace glam::packed
