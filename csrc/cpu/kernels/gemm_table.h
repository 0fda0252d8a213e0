// The product core of the instruction set in use, as the torch side calls it. Semantics: kernels/gemm.h.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

template <class T>
struct GemmFunctions {
  int64_t tile_rows;
  int64_t tile_columns;
  void (*pack)(const Operand& operand, int64_t begin, int64_t end, int64_t depth, int64_t width, T* panels);
  void (*multiply)(int64_t rows, int64_t columns, int64_t depth, const T* a_panels, const T* b_panels, T* c,
                   int64_t c_stride);
  // values[rows][stride] -> the block of `output` whose first element is (row, column).
  void (*store)(const T* values, int64_t stride, int64_t rows, int64_t columns, const Output& output, int64_t row,
                int64_t column);
};

using GemmTable = TypedTable<GemmFunctions>;
GLAM_PER_ISA_TABLE(GemmTable, gemm_table)

template <class T>
const GemmFunctions<T>& gemm_functions() {
  return functions_for<T>(active_gemm_table());
}

}  // namespace glam::cpu
