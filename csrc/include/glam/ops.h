// The ops as C++ functions: each calls the op torch.ops.glam.<name> through the dispatcher, so autograd, autocast and
// tracing work as from Python. Bad arguments raise c10::Error with `glam::op: expected ..., got ...`.
//
// Letters: B sequences, S positions, T = B*S tokens, D model dim, F hidden dim, H heads, A head dim, E experts,
// K choices of a token (2 in GLaM), R routed rows, C slots of an expert in a group, G routing groups, P expert-parallel
// ranks, V vocabulary. Floating tensors are float64, float32 or bfloat16; sums are float32 or wider.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace glam {

// While one lives, backward passes that this thread runs add the gradients of experts' weights (moe_mlp, expert_mlp,
// exchange_mlp) to those that the weights have, where they lie, as they are computed: micro-batches then neither write
// nor hold a second set of them. A table that linear_cross_entropy and embedding share gets one gradient instead of two
// that are added. What .grad() is afterwards, to the bit for float32 weights, and which hooks run is the
// same as without. It applies where autograd would add in place too and nothing looks at the new part alone: weights that
// are leaves with a contiguous gradient of their dtype and without hooks of their own (Tensor.register_hook; those that
// run after accumulation are no obstacle), in a backward pass over the whole graph, without create_graph. Everything
// else is as ever. Two threads must not run backward passes over the same weights meanwhile. If such a pass fails,
// the gradients are undefined.
class AccumulateInPlace {
 public:
  AccumulateInPlace();
  ~AccumulateInPlace();
  AccumulateInPlace(const AccumulateInPlace&) = delete;
  AccumulateInPlace& operator=(const AccumulateInPlace&) = delete;

 private:
  bool before_;
};

// A weight [K, N] or [E, K, N], float32 or bfloat16, packed for inference: bfloat16 (rounded to nearest even) or int8 (one
// float32 scale per column: largest magnitude / 127), in the order in which few rows are multiplied with it. linear,
// linear_wide, moe_mlp, expert_mlp and geglu_mlp take it where they take the plain weight, embedding and
// linear_cross_entropy (without gradients) the packed table.t(). K is even, N a multiple of 32. With bfloat16 the results
// have the bits of the same weight rounded to bfloat16.
at::Tensor pack_weight(const at::Tensor& weight, at::ScalarType dtype);
// The plain weight again, bfloat16 or for int8 float32.
at::Tensor unpack_weight(const at::Tensor& packed);

// --- Gating and routing: GShard (arXiv 2006.16668) algorithm 1 as GLaM (arXiv 2112.06905) uses it -------------------

// Top-2 gating of logits [T, E]. Groups of group_size consecutive tokens (-1: all tokens are one group, even of none)
// route on their own; an expert has `capacity` slots in each group (-1: as many as needed), given to all first choices
// before any second choice, in token order.
//   token_mask [T] bool, true for real tokens; a masked one takes no slot and no weight.
//   noise: uniform numbers, float32 or float64: [T] for "random", [T, E] for "sampling", absent for "all".
//   second_policy: "all" takes the second largest probability; "random" keeps it only if
//     noise * max(second_threshold, 1e-9) < its normalised gate; "sampling" draws it by Gumbel-max.
//   normalize_before_capacity: gates are divided by g1 + g2 + 1e-9 before slots are given (a token that loses one
//     expert keeps a weight below 1); otherwise by the sum of the kept ones afterwards.
// Returns
//   gates [T, 2] float32 (float64 for float64 logits), 0 where the choice has no row;
//   expert_ids [T, 2] int32, always in [0, E);
//   positions [T, 2] int32: the slot within (group, expert), or -1 masked or skipped by the policy, -2 over capacity,
//     -3 a gate of exactly zero (its slot is used up, it gets no row; -2 wins);
//   aux_loss [G] in the gates' dtype: E * sum over e of fraction of first choices * mean probability; 0 without tokens.
// Differentiable in logits through the gates of choices that have a row, and through aux_loss. A token with a
// non-finite logit gets ids 0 and 1, slots as usual, NaN gates, and a NaN aux_loss for its group; with
// GLAM_DEBUG_NONFINITE=1 in the environment it raises instead.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> top2_gating(
    const at::Tensor& logits, const std::optional<at::Tensor>& token_mask = std::nullopt,
    const std::optional<at::Tensor>& noise = std::nullopt, c10::SymInt group_size = -1, c10::SymInt capacity = -1,
    std::string_view second_policy = "all", double second_threshold = 0., bool normalize_before_capacity = true);

// Where each choice goes, from expert_ids and positions [T, K] int32. A choice has a row iff its position is >= 0.
//   slots = -1 (tight): R = T*K, rows ordered by expert, then token, then choice; those from offsets[E] on are unused.
//   slots = C (slotted): R = E*G*C, row = (expert * G + group) * C + position; unused slots are empty rows.
// Returns row_of_choice [T, K] and choice_of_row [R] (= t*K + k), -1 for none, and offsets [E + 1]; all int32.
// On CPU an expert id outside [0, E), a position outside the slots, or a slot taken twice raises.
std::tuple<at::Tensor, at::Tensor, at::Tensor> routing_plan(const at::Tensor& expert_ids, const at::Tensor& positions,
                                                            c10::SymInt num_experts, c10::SymInt group_size = -1,
                                                            c10::SymInt slots = -1);

// rows [R, D] of x [T, D]: the token of each row, zeros in an empty one.
at::Tensor dispatch(const at::Tensor& x, const at::Tensor& row_of_choice, const at::Tensor& choice_of_row,
                    const at::Tensor& offsets);

// y [T, D] = sum over k of gates[t, k] * rows[row_of_choice[t, k]], in the rows' dtype; choices without a row add nothing.
// rows [R, D]; gates [T, K] float32 (float64 with float64 rows).
at::Tensor combine(const at::Tensor& rows, const at::Tensor& gates, const at::Tensor& row_of_choice,
                   const at::Tensor& choice_of_row, const at::Tensor& offsets);

// --- Exchange between expert-parallel ranks ---------------------------------------------------------------------------

// How many rows this rank sends to, and receives from, each rank for each expert of the receiver: int32 [2, P, E_local].
// offsets [P*E_local + 1] are the plan's; `group` names a process group, empty for one process alone.
at::Tensor exchange_counts(const at::Tensor& offsets, std::string_view group);

// Sends in_splits[p] rows to rank p, in order from row 0, and returns the out_splits[p] rows that came from each, in rank
// order: [sum(out_splits), ...]. This rank's own entry is the same in both. Empty splits: R / P rows to and from every
// rank. Rows that are not sent get zero gradient. The group's ranks must all call it.
at::Tensor exchange(const at::Tensor& rows, at::IntArrayRef out_splits, at::IntArrayRef in_splits,
                    std::string_view group);

// The sum of a floating tensor over the ranks of a group, added in rank order: the same bits on every rank. Not
// differentiable; for small tensors, every rank receives those of all.
at::Tensor ordered_all_reduce(const at::Tensor& x, std::string_view group);

// --- Products and feed-forward networks: weights are rounded to x's dtype where they enter a product ----------------------

// y [..., D_out] = x [..., D_in] weight [D_in, D_out], in x's dtype; linear_wide leaves it in float32 (or float64).
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight);
at::Tensor linear_wide(const at::Tensor& x, const at::Tensor& weight);

// What top2_gating takes: [..., E] = x [..., D] weight [D, E], multiplied and left in float32 (float64 for float64 x), with
// autocast too. The bits of linear(x.to(float32), weight) and of its gradients, rounded to x's dtype and the weight's.
at::Tensor router_logits(const at::Tensor& x, const at::Tensor& weight);

// out[r] = act(rows[r] wi[e]) wo[e]; for "geglu" (gelu(rows[r] wg[e]) * (rows[r] wi[e])) wo[e]. activation: relu, gelu,
// geglu. rows [R, D]; offsets int32 [S + 1]: segment s has rows [offsets[s], offsets[s + 1]) and expert s mod E; rows
// after the last segment give 0. wi, wg [E, D, F], wo [E, F, D]; wg with geglu only.
at::Tensor expert_mlp(const at::Tensor& rows, const at::Tensor& offsets, const at::Tensor& wi, const at::Tensor& wo,
                      const std::optional<at::Tensor>& wg, std::string_view activation);

// combine(expert_mlp(dispatch(x)), gates) in one, without the rows in between. x [T, D]; gates [T, K] float32 (float64
// with float64 x); the three tensors of a routing plan.
at::Tensor moe_mlp(const at::Tensor& x, const at::Tensor& gates, const at::Tensor& row_of_choice,
                   const at::Tensor& choice_of_row, const at::Tensor& offsets, const at::Tensor& wi,
                   const at::Tensor& wo, const std::optional<at::Tensor>& wg, std::string_view activation);

// exchange, expert_mlp and exchange back in one op, in `chunks` parts whose transfers and products overlap. The group has
// P ranks, each with E experts, E / chunks of them in a chunk. rows [R, D] in order (chunk, receiving rank, expert);
// offsets int32 [P * E + 1] of the received rows' segments in order (chunk, sending rank, expert); out_splits and
// in_splits [chunks * P] in order (chunk, rank), empty: R / (chunks * P) rows to and from each rank. Returns [R, D]; rows
// after the first sum(in_splits) give 0. wi, wg [E, D, F], wo [E, F, D]: those of this rank.
at::Tensor exchange_mlp(const at::Tensor& rows, const at::Tensor& offsets, at::IntArrayRef out_splits,
                        at::IntArrayRef in_splits, const at::Tensor& wi, const at::Tensor& wo,
                        const std::optional<at::Tensor>& wg, std::string_view activation, std::string_view group,
                        int64_t chunks = 1);

// y = (gelu(x w0) * (x w1)) wo, with the tanh GELU. x [..., D]; w0, w1 [D, F]; wo [F, D]. Source: arXiv 2002.05202.
at::Tensor geglu_mlp(const at::Tensor& x, const at::Tensor& w0, const at::Tensor& w1, const at::Tensor& wo);

// --- Loss and the model's small change ------------------------------------------------------------------------------------

// Cross entropy of logits = cap(scale * hidden embedding^T) that never exist as [T, V]. hidden [T, D], embedding [V, D],
// targets int64 [T] in [0, V), weights [T] float32 (float64 with float64 hidden), 0 for padding. Returns
//   loss_sum []: sum of weights * ((1 - s) nll + s (lse - mean logit) + z_loss * lse^2), s = label_smoothing;
//   nll [T] = lse - logit of the target; lse [T] = log sum exp of the logits.
// logit_cap c > 0: logits pass c tanh(l / c). vocab_start and group: embedding holds the rows of a split vocabulary
// from vocab_start on, equally many on each rank. Only loss_sum is differentiable; a gradient at nll or lse raises.
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy(
    const at::Tensor& hidden, const at::Tensor& embedding, const at::Tensor& targets,
    const std::optional<at::Tensor>& weights = std::nullopt, double scale = 1., double z_loss = 0.,
    double label_smoothing = 0., double logit_cap = 0., c10::SymInt vocab_start = 0, std::string_view group = "");

// x in "bfloat16" or "float32"; float64 stays.
at::Tensor to_compute_dtype(const at::Tensor& x, std::string_view dtype);

// The sum of all elements of x in their order, computed in float64, [] in x's dtype; torch's sum depends on the threads.
at::Tensor ordered_sum(const at::Tensor& x);

// int64 [E + 6] from top2_gating's expert_ids and positions: rows of each expert, first and second choices over capacity,
// tokens with 0, 1 and 2 rows, real tokens.
at::Tensor router_statistics(const at::Tensor& expert_ids, const at::Tensor& positions, c10::SymInt num_experts);

// --- Norm, embedding, attention, sampling ------------------------------------------------------------------------------

// x * rsqrt(mean(x^2) + eps) * scale over the last dimension, in x's dtype. x [..., D], scale [D].
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& scale, double eps = 1e-6);

// Rows of table [V, D] by ids (int32 or int64, any shape): [..., D] in the table's dtype. An id outside [0, V) raises.
at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table);

// Causal attention with T5's bucketed relative bias and without 1/sqrt(A). q, k, v [B, S, H, A]; bias [H, 32] float32
// (float64 with float64 q); segment_ids int32 [B, S], 0 = padding (output 0, not attended to). extra_logit adds exp(0) to
// every softmax denominator; logit_cap c > 0 passes logits through c tanh(l / c).
at::Tensor relative_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& bias,
                              const std::optional<at::Tensor>& segment_ids = std::nullopt, bool extra_logit = true,
                              double logit_cap = 0.);

// The same for N new tokens per row, q, k, v [B, N, H, A], over caches [B, max_len, H, A], which are written in place.
// positions int32 [B]: index of the first new token, -1 for a finished row (nothing written, output 0).
at::Tensor relative_attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& k_cache,
                                   at::Tensor& v_cache, const at::Tensor& positions, const at::Tensor& bias,
                                   bool extra_logit = true, double logit_cap = 0.);

// cache[b] = old cache[beams[b]], in place. cache [B, ...], beams int64 [B].
void reorder_cache_(at::Tensor& cache, const at::Tensor& beams);

// Draws a token per row. logits float32 [B, V], uniform float32 [B] in [0, 1) -> int64 [B]. temperature 0: the largest
// logit, lowest index on a tie. top_k 0 and top_p 1 keep everything.
at::Tensor sample_logits(const at::Tensor& logits, const at::Tensor& uniform, double temperature = 1.,
                         int64_t top_k = 0, double top_p = 1.);

// Uniform numbers in [0, 1), float32, one per index (int64, any shape): a function of seed, stream and index alone.
at::Tensor counter_uniform(int64_t seed, int64_t stream, const at::Tensor& index);

// --- Optimiser steps: what glam/optim.h is made of ------------------------------------------------------------------------

// Adafactor's step of a list of P parameters weight [..., R, C] in four calls, with sums over the shards of split
// parameters between them; the formulas are in csrc/ops/adafactor.cpp. All of one dtype, float32 or float64, on one device.
// Factored state: row_var [..., R], col_var [..., C], for N matrices; otherwise row_var is the full variance, col_var is
// [0] and N = 1. step [] int64 counts the updates applied before; where skip [] bool is true nothing changes. num_rows,
// num_cols (read of factored parameters) and num_elements are those of the whole parameters. Results hold those of the
// list one parameter behind the other.
//
// row_sums [sum of N R] and col_sums [sum of N C] of grad^2, of the factored ones, and weight_squares [P] float64.
std::tuple<at::Tensor, at::Tensor, at::Tensor> adafactor_sums(at::TensorList grads, at::TensorList weights,
                                                              const std::vector<bool>& factored);
// Updates the state; float64 [sum of N]: row_means = sum of row_var / num_rows and scaled_squares = sum of grad^2 /
// (row_var col_var) (unfactored: 1 and the sum of grad^2 / variance).
std::tuple<at::Tensor, at::Tensor> adafactor_stats_(at::TensorList row_vars, at::TensorList col_vars,
                                                    at::TensorList grads, const at::Tensor& row_sums,
                                                    const at::Tensor& col_sums, const at::Tensor& step,
                                                    const std::optional<at::Tensor>& skip, c10::SymIntArrayRef num_rows,
                                                    c10::SymIntArrayRef num_cols, double decay = -0.8,
                                                    double eps = 1e-30);
// float64 [P]: of each parameter the sum of row_means * scaled_squares over its num_matrices matrices.
at::Tensor adafactor_update_squares(const at::Tensor& row_means, const at::Tensor& scaled_squares,
                                    c10::SymIntArrayRef num_matrices);
// Updates the weights. lr is a scalar tensor.
void adafactor_apply_(at::TensorList weights, at::TensorList grads, at::TensorList row_vars, at::TensorList col_vars,
                      const at::Tensor& row_means, const at::Tensor& weight_squares, const at::Tensor& update_squares,
                      const at::Tensor& lr, const std::optional<at::Tensor>& skip, c10::SymIntArrayRef num_elements,
                      double clipping = 1., double min_scale = 1e-3);

// Of each of P tensors, of any floating dtypes: the sum of x^2, [P] float64, in a fixed order, and whether a square is
// infinite or NaN in float32 (float64 for float64), [P] bool.
std::tuple<at::Tensor, at::Tensor> squared_norm(at::TensorList xs);

}  // namespace glam
