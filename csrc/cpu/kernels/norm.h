// RMSNorm over blocks of rows. x, y and their gradients are contiguous [rows, D] of `type`; scale is [D] of the
// accumulation type. Row sums run over 16 fixed lanes (lanes.h): a row's bits depend on the row alone.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

template <class T>
struct NormFunctions {
  // y = x * rsqrt(mean(x^2) + eps) * scale. row: D elements of scratch.
  void (*forward)(const void* x, Type type, const T* scale, T eps, int64_t rows, int64_t D, void* y, T* row);
  // grad_scale[D] <- the sum over these rows, in order. scratch: 2 * D elements.
  void (*backward)(const void* grad, const void* x, Type type, const T* scale, T eps, int64_t rows, int64_t D,
                   void* grad_x, T* grad_scale, T* scratch);
};

using NormTable = TypedTable<NormFunctions>;
GLAM_PER_ISA_TABLE(NormTable, norm_table)

template <class T>
const NormFunctions<T>& norm_functions() {
  return functions_for<T>(active_norm_table());
}

}  // namespace glam::cpu
