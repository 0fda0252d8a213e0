// The product core of the instruction set in use, as the torch side calls it. Semantics: kernels/gemm.h.
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

// Of the depth that B's panels hold: the part [begin, end) of `all`; begin is a multiple of 64. A product's first part
// begins its sums at 0, its last one has them ready.
struct DepthPart {
  int64_t begin, end, all;
  bool is_first, is_last;
};

template <class T>
struct GemmFunctions {
  int64_t tile_rows;
  int64_t tile_columns;
  // Limits of what a thread works on at a time: tiles of rows, and the eighths of the second-level cache that A panels and
  // sums may take.
  int64_t block_row_tiles;
  int64_t block_eighths;
  // Of a panel: bytes of one outer index for a depth.
  int64_t (*panel_bytes)(int64_t depth);
  // Panels of the outer indices [begin, end), of the A side and of the B side.
  void (*pack_a)(const Operand& operand, int64_t begin, int64_t end, int64_t depth, void* panels);
  void (*pack_b)(const Operand& operand, int64_t begin, int64_t end, int64_t depth, void* panels);
  // B's panels from `column` on, a panel's first, if they lie in memory as they would be packed; else null.
  const void* (*panels_in_place)(const Operand& b, int64_t column, int64_t depth);
  // Whether a product's depth must be one part.
  bool whole_depth;
  // A B over a part of the depth, which is what A's panels hold. `sums` are kept from part to part: a tile's, of one strip
  // of B or, if there are more parts, of all. The last part's are c[rows][columns].
  void (*multiply)(int64_t rows, int64_t columns, const DepthPart& depth, const void* a_panels, const void* b_panels,
                   T* sums, T* c, int64_t c_stride);
  // The same, of which the last part's, with the scales of columns [column, column + columns) of B, are stored as the block
  // of `output` at (row, column).
  void (*multiply_into)(int64_t rows, int64_t columns, const DepthPart& depth, const void* a_panels,
                        const void* b_panels, T* sums, const Operand& b, const Output& output, int64_t row,
                        int64_t column);
  // c[rows][columns] *= the scales that columns [column, column + columns) of B have, if B is stored as integers.
  void (*scale)(const Operand& b, int64_t rows, int64_t column, int64_t columns, T* c, int64_t c_stride);
  // For up to few_rows rows of A: with loaded rows (few_rows * panel_bytes), columns [column, column + columns) of a B that is
  // read where it lies, if can_stream says that it can be.
  int64_t few_rows;
  bool (*can_stream)(const Operand& a, const Operand& b);
  void (*load_few)(const Operand& a, int64_t rows, int64_t depth, void* loaded);
  void (*multiply_few)(int64_t rows, const void* loaded, const Operand& b, int64_t column, int64_t columns,
                       int64_t depth, T* c, int64_t c_stride);
  // values[rows][stride] -> the block of `output` whose first element is (row, column).
  void (*store)(const T* values, int64_t stride, int64_t rows, int64_t columns, const Output& output, int64_t row,
                int64_t column);
};

using GemmTable = TypedTable<GemmFunctions>;
using Bf16GemmTable = GemmFunctions<float>;
GLAM_PER_ISA_TABLE(GemmTable, gemm_table)
GLAM_PER_ISA_TABLE_WITH_BF16(Bf16GemmTable, bf16_gemm_table)

// T is the accumulation type; bfloat16 products are accumulated in float.
template <class T>
const GemmFunctions<T>& gemm_functions(Precision precision) {
  if constexpr (std::is_same_v<T, float>) {
    if (precision == Precision::bf16) return active_bf16_gemm_table();
  }
  return functions_for<T>(active_gemm_table());
}

}  // namespace glam::cpu
