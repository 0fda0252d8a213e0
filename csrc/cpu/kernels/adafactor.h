// Adafactor's passes over one contiguous matrix or block of elements, and sums of squares. Sums run in double over fixed
// lanes (lanes.h), or down the rows in their order, so that blocks fixed by the caller give the same bits for any threads.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

struct SquareSum {
  double sum;
  bool finite;  // every square is finite in the accumulation type
};

template <class T>
struct AdafactorFunctions {
  SquareSum (*square_sum)(const void* x, Type type, int64_t count);
  // row_sums[i] = sum over j of grad[i][j]^2; column_sums[j] = sum over these rows.
  void (*matrix_sums)(const T* grad, int64_t rows, int64_t columns, T* row_sums, T* column_sums);
  // Sum of (grad[i][j] * row_scale[i] * column_scale[j])^2.
  double (*scaled_square_sum)(const T* grad, int64_t rows, int64_t columns, const T* row_scale, const T* column_scale);
  // weight[i][j] -= grad[i][j] * row_scale[i] * column_scale[j]
  void (*apply_matrix)(T* weight, const T* grad, int64_t rows, int64_t columns, const T* row_scale,
                       const T* column_scale);
  // variance <- decay * variance + (1 - decay) * (grad^2 + eps); returns the sum of grad^2 / variance.
  double (*update_variance)(T* variance, const T* grad, int64_t count, T decay, T eps);
  // weight -= factor * grad / sqrt(variance)
  void (*apply_elements)(T* weight, const T* grad, const T* variance, int64_t count, T factor);
};

using AdafactorTable = TypedTable<AdafactorFunctions>;
GLAM_PER_ISA_TABLE(AdafactorTable, adafactor_table)

template <class T>
const AdafactorFunctions<T>& adafactor_functions() {
  return functions_for<T>(active_adafactor_table());
}

}  // namespace glam::cpu
