// Random numbers from counters, and the choice of a token from logits with one of them. Rules: csrc/ops/sampling.cpp.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

// out[i] in [0, 1): the upper 24 bits of the first word of Philox 4x32-10 with key `seed` and counter (index[i],
// stream).
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
void counter_uniform(int64_t seed, int64_t stream_number, const int64_t* index, int64_t count, float* out,
                     cudaStream_t stream);

// In both, logits are float32 or float64 and V is at least 1. Nobody checks values before the launch: chosen[b] is -1
// where the largest logit of the row is not finite, one is NaN, or uniform[b] is outside [0, 1).

// chosen[b] = the index of the largest of logits [B, V], the lowest among equals.
void choose_largest(const void* logits, Type type, const float* uniform, int64_t B, int64_t V, int64_t* chosen,
                    cudaStream_t stream);

// One draw per row. sorted [B, V] are the logits in descending order (NaN at an end), equal ones by ascending index,
// and order [B, V] their indices. temperature > 0; kept: how many candidates top_k leaves, 1 to V; top_p in (0, 1].
// Weights and their sums are float64.
void sample_sorted(const void* sorted, Type type, const int64_t* order, const float* uniform, int64_t B, int64_t V,
                   double temperature, int64_t kept, double top_p, int64_t* chosen, cudaStream_t stream);

}  // namespace glam::cuda
