// Embedding: y[t] = table[ids[t]], and the table's gradient from positions that are sorted by id.
//
// table, grad_table [V, D], y, grad [T, D] contiguous, of `type`; ids [T] int64. Nobody checks an id before the launch:
// a row of y whose id is outside [0, V) is NaN, and such a position adds nothing to the gradient.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

void embedding(const int64_t* ids, const void* table, Type type, int64_t T, int64_t V, int64_t D, void* y,
               cudaStream_t stream);

// Elements of the workspace of embedding_backward, in float32 (float64 for float64).
int64_t embedding_partial_size(int64_t T, int64_t D);

// grad_table[v] = (or +=, to `add`) sum over the positions t with ids[t] = v of grad[t], in the positions' order within
// fixed chunks of the sorted positions, the chunks' sums then in a fixed order too; no atomics. sorted_ids [T]
// ascending, order [T] the positions they come from (a stable sort). Sums are float32 (float64 for float64). Rows of
// other ids are not touched.
void embedding_backward(const void* grad, Type type, const int64_t* sorted_ids, const int64_t* order, int64_t T,
                        int64_t V, int64_t D, void* partial, bool add, void* grad_table, cudaStream_t stream);

}  // namespace glam::cuda
