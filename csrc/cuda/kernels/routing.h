// CUDA kernels of routing_plan, dispatch and combine. Letters and formulas: ops/routing.cpp.
//
// A plan's indices are not checked on the host, which would have to wait for the device: an expert outside [0, E) and a
// position outside its slots give no row, a row or choice out of range is taken for none. Nothing is read or written
// outside the arrays.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

// Choices that one block of the counting sort orders.
constexpr int64_t kSortChunk = 2048;
// So many experts' counters fit into shared memory.
constexpr int64_t kMostSortedExperts = 4096;

// The tight plan: a stable counting sort of `choices` = T * K choices by expert.
//   ids, positions [choices]; row_of_choice, choice_of_row [choices]; offsets [E + 1]
//   counts: workspace of ceil(choices / kSortChunk) * E
void tight_plan(const int32_t* ids, const int32_t* positions, int64_t choices, int64_t E, int32_t* counts,
                int32_t* row_of_choice, int32_t* choice_of_row, int32_t* offsets, cudaStream_t stream);

// The slotted plan: row = (expert * G + group) * C + position. Where a slot is taken twice, one of the two keeps it.
//   choice_of_row [E * G * C]; group_choices = choices of one group
void slotted_plan(const int32_t* ids, const int32_t* positions, int64_t choices, int64_t E, int64_t G, int64_t C,
                  int64_t group_choices, int32_t* row_of_choice, int32_t* choice_of_row, int32_t* offsets,
                  cudaStream_t stream);

// rows[r] = x[choice_of_row[r] / K], or 0 where there is no choice. x [T, D]; rows [R, D].
void dispatch(const void* x, Type type, const int32_t* choice_of_row, int64_t T, int64_t K, int64_t R, int64_t D,
              void* rows, cudaStream_t stream);

// y[t] = sum over k of gates[t, k] * rows[row_of_choice[t, k]], k ascending. rows [R, D] of row_type, either y's type
// or its accumulation type; gates [T, K] in the accumulation type, null for 1.
void combine(const void* rows, Type row_type, const void* gates, const int32_t* row_of_choice, int64_t T, int64_t K,
             int64_t R, int64_t D, void* y, Type y_type, cudaStream_t stream);

// grad_rows[r] = gates[choice] * grad_y[token] and grad_gates[choice] = <grad_y[token], rows[r]>; grad_rows is 0 for a
// row without a choice, and grad_gates of a choice without a row is left as it is.
void combine_backward(const void* grad_y, const void* rows, Type type, const void* gates, const int32_t* choice_of_row,
                      int64_t T, int64_t K, int64_t R, int64_t D, void* grad_rows, void* grad_gates,
                      cudaStream_t stream);

}  // namespace glam::cuda
