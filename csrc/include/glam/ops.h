// The ops as C++ functions: each calls the op torch.ops.glam.<name> through the dispatcher, so autograd, autocast and
// tracing work as from Python. Bad arguments raise c10::Error with `glam::op: expected ..., got ...`.
//
// Letters: B sequences, S positions, T = B*S tokens, D model dim, F hidden dim, H heads, A head dim, E experts,
// K choices of a token (2 in GLaM), R routed rows, C slots of an expert in a group, G routing groups, P expert-parallel
// ranks, V vocabulary. Floating tensors are float64, float32 or bfloat16; sums are float32 or wider.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace glam {

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
// order: [sum(out_splits), ...]. Empty splits: R / P rows to and from every rank. Rows that are not sent get zero
// gradient. The group's ranks must all call it.
at::Tensor exchange(const at::Tensor& rows, at::IntArrayRef out_splits, at::IntArrayRef in_splits,
                    std::string_view group);

}  // namespace glam
