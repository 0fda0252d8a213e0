// The matrices of a product as the packing code sees them: rows of contiguous values that may be gathered, activated,
// scaled and rounded on the way in, so that none of these steps needs a tensor of its own.
//
// C[i, j] = sum over k of A[i, k] * B[k, j]. An operand's rows are either its outer index (i of A, j of B) or k.
#pragma once

#include <cstdint>

#include "ops/packed_layout.h"

namespace glam::cpu {

enum class Type : int32_t { f64, f32, bf16, i8 };

// geglu: gelu(gate) * value, where `gate` is a second matrix of the same type and stride. GELU is its tanh form.
enum class Transform : int32_t { none, relu, gelu, geglu };

// What a product multiplies: values of the accumulation type, or both operands rounded to bfloat16 (after transform and
// scale) with sums in float.
enum class Precision : int32_t { full, bf16 };

struct Operand {
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t row_stride = 0;  // in elements
  bool rows_are_k = false;
  // Row r of the operand is row row_index[r] / row_divisor of the data; a negative index is a row of zeros.
  const int32_t* row_index = nullptr;
  int32_t row_divisor = 1;
  Transform transform = Transform::none;
  const void* gate = nullptr;
  const void* row_scale = nullptr;  // of the accumulation type, one per operand row
  // Packed for inference (kernels/stored.h): `data` is the first strip, bf16 or i8, and row_stride its elements. B only.
  bool stored = false;
};

struct Output {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t row_stride = 0;
  bool accumulate = false;  // add to what is there
  bool stream = false;      // past the caches: for what is larger than they are and not read soon
};

inline int64_t size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : type == Type::bf16 ? 2 : 1; }

inline const void* advance(const void* data, Type type, int64_t elements) {
  return static_cast<const char*>(data) + elements * size_of(type);
}
inline void* advance(void* data, Type type, int64_t elements) {
  return static_cast<char*>(data) + elements * size_of(type);
}

// The operand without its first rows; T is the accumulation type.
template <class T>
inline Operand from_row(Operand operand, int64_t row) {
  if (operand.row_scale) operand.row_scale = static_cast<const T*>(operand.row_scale) + row;
  if (operand.row_index) {
    operand.row_index += row;
    return operand;
  }
  operand.data = advance(operand.data, operand.type, row * operand.row_stride);
  if (operand.gate) operand.gate = advance(operand.gate, operand.type, row * operand.row_stride);
  return operand;
}
// The operand without what comes before k, which is even if it is stored; T is the accumulation type.
template <class T>
inline Operand from_k(Operand operand, int64_t k) {
  if (operand.rows_are_k) return from_row<T>(operand, k);
  if (operand.stored) k *= kStripColumns;
  operand.data = advance(operand.data, operand.type, k);
  if (operand.gate) operand.gate = advance(operand.gate, operand.type, k);
  return operand;
}

}  // namespace glam::cpu
