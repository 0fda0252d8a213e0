// Small reductions of the model's wiring: the sum of a tensor, and the router's counts.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

// out [] = the sum of x [count], both of `type`, added in float64 in a fixed order: each of up to 256 blocks strides
// through x, then the blocks' sums are added. `partial` is a workspace of kSumPartials doubles. count may be 0.
constexpr int64_t kSumPartials = 256;
void ordered_sum(const void* x, Type type, int64_t count, double* partial, void* out, cudaStream_t stream);

// counts [E + 6] of expert_ids and positions [T, 2]: rows of each expert, then first choices over capacity, second
// choices over capacity, tokens with 0, 1 and 2 rows, real tokens (positions: -1 none, -2 over capacity; a first choice
// of -1 is padding). An id outside [0, E) counts for no expert. T may be 0.
void router_statistics(const int32_t* expert_ids, const int32_t* positions, int64_t T, int64_t E, int64_t* counts,
                       cudaStream_t stream);

}  // namespace glam::cuda
