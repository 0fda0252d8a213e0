// The row kernels for a tensor's dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/kernels/rows.h"

namespace glam::cpu {

// f(functions, Scalar{}) for Double, Float or BFloat16.
template <class F>
void dispatch_rows(at::ScalarType dtype, F&& f) {
  const RowTable& table = active_row_table();
  if (dtype == at::kDouble) {
    f(table.f64, double{});
  } else if (dtype == at::kFloat) {
    f(table.f32, float{});
  } else {
    f(table.bf16, Bf16{});
  }
}

}  // namespace glam::cpu
