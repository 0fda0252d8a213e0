// Sums of listed rows, the gradient of a table: out[s] = sum over i in [starts[s], starts[s + 1]) of rows[order[i]].
#pragma once

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

struct RowSums {
  const void* rows = nullptr;  // [T, D] contiguous
  void* out = nullptr;         // sum s is added to row ids[s] of a contiguous [V, D]
  Type type = Type::f32;
  int64_t D = 0;
  const int64_t* order = nullptr;
  const int64_t* starts = nullptr;
  const int64_t* ids = nullptr;
  int64_t num_sums = 0;
};

struct EmbeddingTable {
  // Columns [begin, end) of every sum; accumulation in float32 (float64 for float64), in the listed order.
  void (*add_rows)(const RowSums& sums, int64_t begin, int64_t end);
};

GLAM_PER_ISA_TABLE(EmbeddingTable, embedding_table)

}  // namespace glam::cpu
