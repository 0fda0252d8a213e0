// One token's part of gating: its softmax and the largest of its probabilities.
#pragma once

#include <cstdint>

#include "cpu/kernels/operand.h"
#include "cpu/kernels/per_isa.h"

namespace glam::cpu {

template <class T>
struct GatingFunctions {
  // p = softmax(logits), count > 0. False (and p undefined) if a logit is not finite.
  bool (*softmax)(const void* logits, Type type, int64_t count, T* p);
  // The first index of the largest of count > 0 values, none of them NaN.
  int64_t (*first_largest)(const T* values, int64_t count);
};

using GatingTable = TypedTable<GatingFunctions>;
GLAM_PER_ISA_TABLE(GatingTable, gating_table)

template <class T>
const GatingFunctions<T>& gating_functions() {
  return functions_for<T>(active_gating_table());
}

}  // namespace glam::cpu
