// CUDA kernels of the expert networks: act(rows Wi) Wo and its gradients, over segments of rows. Formulas:
// ops/experts.cpp.
//
// Letters: R rows, D model dim, F hidden dim, E experts held, S segments; segment s = rows [offsets[s], offsets[s + 1])
// and uses expert s mod E; rows from offsets[S] on belong to none and become 0. offsets stay on the device: grids are
// sized for the most tiles that R rows in S segments can need, and a block finds its segment by itself. Offsets that do
// not ascend within [0, R] give wrong or unwritten rows, never an access outside the arrays.
//
// These are plain tiled products on the ordinary cores, the first rung of a ladder whose next ones use tensor cores.
// Sums are in the accumulation type and run over k in ascending order, so a row's bits depend on that row and the
// weights.
#pragma once

#include "cuda/kernels/types.h"

namespace glam::cuda {

enum class Activation { relu, gelu, geglu };

// Rows [R, D] of an activation type, or rows of tokens [T, D] picked by choice_of_row [R] / num_choices.
struct RowSource {
  const void* data;
  const int32_t* choice_of_row = nullptr;  // null: row r is row r
  int64_t num_choices = 1;
  int64_t num_tokens = 0;
};

struct ExpertProblem {
  int64_t R, D, F, E, S;
  const int32_t* offsets;  // [S + 1]; null: one segment that has all rows
  Activation activation;
  Type type;         // of activations
  Type weight_type;  // `type`, or f32 beside a 16-bit type
};

// pre [R, F] = rows Wi; pre_gate [R, F] = rows Wg with geglu. wi, wg [E, D, F].
void expert_up(const ExpertProblem& problem, const RowSource& rows, const void* wi, const void* wg, void* pre,
               void* pre_gate, cudaStream_t stream);

// out [R, D] = act(pre) Wo, in `type` or, if out_wide, in the accumulation type. wo [E, F, D].
void expert_down(const ExpertProblem& problem, const void* pre, const void* pre_gate, const void* wo, void* out,
                 bool out_wide, cudaStream_t stream);

// Columns of grad_gate_parts: tiles of F.
int64_t gate_parts(int64_t F);

// grad_pre, grad_pre_gate [R, F] from dy Wo^T, scaled by the gates [T * K] of the rows' choices if there are any; then
// grad_gate_parts [R, gate_parts(F)] holds sums over tiles of F of act(pre) * (dy Wo^T). Gates and parts are in the
// accumulation type, both null without gates.
void expert_backward_hidden(const ExpertProblem& problem, const RowSource& grad, const void* pre, const void* pre_gate,
                            const void* wo, const void* gates, void* grad_pre, void* grad_pre_gate,
                            void* grad_gate_parts, cudaStream_t stream);

// grad_gates[choice] = the sum of its row's parts, 0 for a choice without a row.
void gate_gradients(const ExpertProblem& problem, const int32_t* row_of_choice, int64_t choices,
                    const void* grad_gate_parts, void* grad_gates, cudaStream_t stream);

// grad_rows [R, D] = grad_pre Wi^T (+ grad_pre_gate Wg^T), in `type` or, if out_wide, in the accumulation type.
void expert_backward_rows(const ExpertProblem& problem, const void* grad_pre, const void* grad_pre_gate, const void* wi,
                          const void* wg, void* grad_rows, bool out_wide, cudaStream_t stream);

// The weights' gradients [E, ...], in weight_type, written or added to what is there: act(pre)^T (gate dy), rows^T
// grad_pre and rows^T grad_pre_gate, summed over an expert's rows in the order of its segments.
void expert_backward_weights(const ExpertProblem& problem, const RowSource& grad, const RowSource& rows,
                             const void* pre, const void* pre_gate, const void* grad_pre, const void* grad_pre_gate,
                             const void* gates, bool add, void* grad_wi, void* grad_wo, void* grad_wg,
                             cudaStream_t stream);

}  // namespace glam::cuda
