// CUDA kernels of top-2 gating. Letters and formulas: ops/gating.cpp.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

// Consecutive tokens of one group that a block handles, whose probabilities are summed together. Part of the result's
// definition (the order of a sum), not a tuning knob.
constexpr int64_t kGatingChunk = 128;
constexpr int64_t kMostGatedExperts = 1024;

enum class SecondChoice { all, random, sampling };

struct GatingProblem {
  int64_t T, E, G, group_size;
  int64_t capacity = -1;  // -1: none
  SecondChoice second = SecondChoice::all;
  double second_threshold = 0;
  bool normalize_before_capacity = false;

  constexpr int64_t chunks_of_group() const { return (group_size + kGatingChunk - 1) / kGatingChunk; }
  constexpr int64_t chunks() const { return G * chunks_of_group(); }
};

// Workspaces, each [chunks, E]; p_sums in float64.
struct GatingWorkspace {
  double* p_sums;
  int32_t *first_counts, *second_counts;
  double* aux_parts;  // [G, ceil(E / 32)]
};

// logits [T, E]; mask [T] or null; noise [T] or [T, E], float64 if noise_is_double, null without need; gates [T, 2] and
// aux [G] in the accumulation type; ids, positions [T, 2]. E at most kMostGatedExperts. Three launches.
void top2_gating(const GatingProblem& problem, const void* logits, Type type, const bool* mask, const void* noise,
                 bool noise_is_double, const GatingWorkspace& workspace, void* gates, int32_t* ids, int32_t* positions,
                 void* aux, cudaStream_t stream);

// grad_logits [T, E] from grad_gates [T, 2] and grad_aux [G], each null where there is none. first_counts: workspace
// [G, E], zeroed; used with grad_aux alone. An id outside [0, E) has no gradient.
void top2_gating_backward(const GatingProblem& problem, const void* grad_gates, const void* grad_aux,
                          const void* logits, Type type, const int32_t* ids, const int32_t* positions,
                          int32_t* first_counts, void* grad_logits, cudaStream_t stream);

}  // namespace glam::cuda
