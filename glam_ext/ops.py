"""The ops as typed, documented functions: thin faces of torch.ops.glam.*, with autograd, autocast and tracing.

Letters, the same everywhere: B sequences, S positions, T = B*S tokens, D model dim, F hidden dim, H heads, A head dim,
E experts, K choices of a token (2 in GLaM), R routed rows, C slots of an expert in a group, G routing groups,
P expert-parallel ranks, V vocabulary. Floating tensors are float64, float32 or bfloat16; sums are float32 or wider.
Every op raises RuntimeError with `glam::op: expected ..., got ...` on arguments that do not fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import glam_ext  # noqa: F401  (registers torch.ops.glam)

# --- gating and routing


def top2_gating(
    logits: Tensor,
    token_mask: Tensor | None = None,
    noise: Tensor | None = None,
    group_size: int = -1,
    capacity: int = -1,
    second_policy: str = "all",
    second_threshold: float = 0.0,
    normalize_before_capacity: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which two experts take each token, with what weight, in which slot.

    GShard's top-2 gating (arXiv 2006.16668, algorithm 1) as GLaM (arXiv 2112.06905) uses it. Groups of consecutive
    tokens route on their own; in each group an expert gives its slots to all first choices before any second choice.

    Args:
        logits: [T, E] router outputs; the softmax is computed in float32 (float64 for float64).
        token_mask: [T] bool, true for real tokens; a masked one takes no slot and no weight.
        noise: uniform numbers, float32 or float64: [T] for "random", [T, E] for "sampling", None for "all".
        group_size: tokens of a group, a divisor of T; -1: all tokens are one group (also when there are none).
        capacity: slots of an expert in a group; -1: as many as needed.
        second_policy: "all": the second largest probability. "random": that one, kept if
            `noise * max(second_threshold, 1e-9)` is below its normalised gate. "sampling": drawn by Gumbel-max.
        second_threshold: see "random".
        normalize_before_capacity: divide the gates by `g1 + g2 + 1e-9` before slots are given, so that a token that
            loses an expert keeps a weight below one; otherwise divide by the sum of the kept gates afterwards.

    Returns:
        gates [T, 2] float32 (float64 for float64 logits), 0 where the choice has no row;
        expert_ids [T, 2] int32, always valid;
        positions [T, 2] int32: the slot within (group, expert), or -1 masked or skipped by the policy, -2 over
        capacity, -3 a gate of exactly zero (its slot is used, it gets no row; -2 wins);
        aux_loss [G], in the gates' dtype: E * sum over e of (fraction of first choices e) * (mean probability of e).

    Differentiable in logits through the gates of choices that have a row, and through aux_loss. A token with a
    non-finite logit gets experts 0 and 1, slots as usual, NaN gates and a NaN aux_loss for its group; with
    GLAM_DEBUG_NONFINITE=1 in the environment it raises.
    """
    return torch.ops.glam.top2_gating(
        logits,
        token_mask,
        noise,
        group_size,
        capacity,
        second_policy,
        second_threshold,
        normalize_before_capacity,
    )


def routing_plan(
    expert_ids: Tensor, positions: Tensor, num_experts: int, group_size: int = -1, slots: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """The row of each choice and the choice of each row; a choice has a row iff its position is >= 0.

    Args:
        expert_ids: [T, K] int32 in [0, num_experts).
        positions: [T, K] int32.
        num_experts: E.
        group_size: as in `top2_gating`; matters to the slotted form only.
        slots: -1: the tight form, R = T*K, rows ordered by expert, then token, then choice, the unused ones last.
            C: the slotted form, R = E*G*C, row = (expert * G + group) * C + position, with empty rows between.

    Returns:
        row_of_choice [T, K] and choice_of_row [R] (= t*K + k), -1 for none, and offsets [E + 1]; all int32.

    On the CPU an expert id or a position out of range, or a slot taken twice, raises.
    """
    return torch.ops.glam.routing_plan(expert_ids, positions, num_experts, group_size, slots)


def dispatch(x: Tensor, row_of_choice: Tensor, choice_of_row: Tensor, offsets: Tensor) -> Tensor:
    """rows [R, D] of x [T, D]: the token of each row, zeros in an empty one. The other three are a `routing_plan`."""
    return torch.ops.glam.dispatch(x, row_of_choice, choice_of_row, offsets)


def combine(rows: Tensor, gates: Tensor, row_of_choice: Tensor, choice_of_row: Tensor, offsets: Tensor) -> Tensor:
    """y [T, D] = sum over k of gates[t, k] * rows[row_of_choice[t, k]]; choices without a row add nothing.

    Args:
        rows: [R, D], the experts' outputs; y has their dtype.
        gates: [T, K] float32, or float64 with float64 rows.
        row_of_choice, choice_of_row, offsets: a `routing_plan`.
    """
    return torch.ops.glam.combine(rows, gates, row_of_choice, choice_of_row, offsets)


# --- exchange between expert-parallel ranks


def exchange_counts(offsets: Tensor, group: str = "") -> Tensor:
    """Rows sent to, and received from, each rank for each expert of the receiver: int32 [2, P, E_local].

    Args:
        offsets: [P * E_local + 1] int32 of a tight `routing_plan` over all experts.
        group: the name of a process group; "" is this process alone.
    """
    return torch.ops.glam.exchange_counts(offsets, group)


def exchange(rows: Tensor, out_splits: Sequence[int] = (), in_splits: Sequence[int] = (), group: str = "") -> Tensor:
    """Send in_splits[p] rows to rank p, from row 0 on, and return the out_splits[p] rows of each rank, in rank order.

    Args:
        rows: [R, ...]; those after the first sum(in_splits) stay and get zero gradient.
        out_splits: P counts of rows to receive; with in_splits empty: R / P from and to each rank.
        in_splits: P counts of rows to send.
        group: the name of a process group, whose ranks must all make the call; "" is this process alone.

    Returns:
        [sum(out_splits), ...].
    """
    return torch.ops.glam.exchange(rows, list(out_splits), list(in_splits), group)
