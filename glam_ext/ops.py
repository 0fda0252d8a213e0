"""The ops as typed, documented functions: thin faces of torch.ops.glam.*, with autograd, autocast and tracing.

Letters, the same everywhere: B sequences, S positions, T = B*S tokens, D model dim, F hidden dim, H heads, A head dim,
E experts, K choices of a token (2 in GLaM), R routed rows, C slots of an expert in a group, G routing groups,
P expert-parallel ranks, V vocabulary. Floating tensors are float64, float32 or bfloat16; sums are float32 or wider.
Every op raises RuntimeError with `glam::op: expected ..., got ...` on arguments that do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from glam_ext import _C  # registers torch.ops.glam

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
        in_splits: P counts of rows to send; this rank's own entry is that of out_splits.
        group: the name of a process group, whose ranks must all make the call; "" is this process alone.

    Returns:
        [sum(out_splits), ...].
    """
    return torch.ops.glam.exchange(rows, list(out_splits), list(in_splits), group)


def ordered_all_reduce(x: Tensor, group: str = "") -> Tensor:
    """The sum of a floating tensor over the ranks of a group, added in rank order: the same bits on every rank.

    Not differentiable. For small tensors: every rank receives those of all.
    """
    return torch.ops.glam.ordered_all_reduce(x, group)


# --- products and feed-forward networks: weights are rounded to x's dtype where they enter a product


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., D_in] times weight [D_in, D_out], in x's dtype.

    A row of the result depends on that row and the weight alone, to the bit: not on the batch or the threads. The
    weight's gradient has the weight's dtype.
    """
    return torch.ops.glam.linear(x, weight)


def linear_wide(x: Tensor, weight: Tensor) -> Tensor:
    """As `linear`, with the sums left in float32 (float64 for float64 x)."""
    return torch.ops.glam.linear_wide(x, weight)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """What `top2_gating` takes: x [..., D] times weight [D, E], multiplied in float32 (float64 for float64 x).

    The bits of `linear(x.float(), weight)` and of its gradients, without x in float32; autocast does not round it.
    Routing in float32 beside 16-bit activations: Switch Transformer (arXiv 2101.03961, section 2.4).

    Returns: [..., E], float32 or float64. The gradients have the dtypes of x and of the weight.
    """
    return torch.ops.glam.router_logits(x, weight)


def expert_mlp(
    rows: Tensor, offsets: Tensor, wi: Tensor, wo: Tensor, wg: Tensor | None = None, activation: str = "relu"
) -> Tensor:
    """The experts' two-layer networks, each on its segment of rows: `act(rows wi[e]) wo[e]`.

    Args:
        rows: [R, D], ordered by segment.
        offsets: int32 [segments + 1]; segment s holds rows offsets[s] to offsets[s + 1] and uses expert s mod E. Rows
            after the last segment give zeros.
        wi, wo: [E, D, F] and [E, F, D].
        wg: [E, D, F], with "geglu" only: `(gelu(rows wg[e]) * (rows wi[e])) wo[e]`.
        activation: "relu", "gelu" (the tanh form) or "geglu".

    Returns: [R, D]. Sources: GShard (arXiv 2006.16668) section 3.2; arXiv 2002.05202 for geglu.
    """
    return torch.ops.glam.expert_mlp(rows, offsets, wi, wo, wg, activation)


def moe_mlp(
    x: Tensor,
    gates: Tensor,
    row_of_choice: Tensor,
    choice_of_row: Tensor,
    offsets: Tensor,
    wi: Tensor,
    wo: Tensor,
    wg: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """`combine(expert_mlp(dispatch(x)))` in one op for one process, without the rows in between.

    x [T, D]; gates [T, K] float32 (float64 with float64 x); row_of_choice, choice_of_row and offsets from
    `routing_plan`; weights as in `expert_mlp`. Saves x, the pre-activations and the plan for the backward.
    """
    return torch.ops.glam.moe_mlp(x, gates, row_of_choice, choice_of_row, offsets, wi, wo, wg, activation)


def exchange_mlp(
    rows: Tensor,
    offsets: Tensor,
    wi: Tensor,
    wo: Tensor,
    wg: Tensor | None = None,
    activation: str = "relu",
    out_splits: Sequence[int] = (),
    in_splits: Sequence[int] = (),
    group: str = "",
    chunks: int = 1,
) -> Tensor:
    """`exchange`, `expert_mlp` and `exchange` back in one op, in `chunks` parts whose transfers and products overlap.

    A rank's E experts are cut into `chunks` equal runs: while one is computed, the next is on its way in and the last
    on its way back, in the backward pass too.

    Args:
        rows: [R, D], in order (chunk, receiving rank, expert of the chunk).
        offsets: int32 [P * E + 1], the segments of the received rows in order (chunk, sending rank, expert).
        wi, wo, wg: the weights of this rank's E experts, as in `expert_mlp`.
        out_splits, in_splits: chunks * P counts of rows to receive and to send, in order (chunk, rank); empty:
            R / (chunks * P) from and to each rank.
        group: the name of a process group, whose ranks must all make the call; "" is this process alone.

    Returns:
        [R, D]; rows after the first sum(in_splits) are zero.
    """
    return torch.ops.glam.exchange_mlp(
        rows, offsets, list(out_splits), list(in_splits), wi, wo, wg, activation, group, chunks
    )


@contextmanager
def accumulate_in_place() -> Iterator[None]:
    """Backward passes inside, on this thread, add the gradients of experts' weights to the present ones as they go.

    Micro-batches then neither write nor hold a second set of gradients of `moe_mlp`, `expert_mlp` and `exchange_mlp`.
    What .grad is afterwards (to the bit for float32 weights) and which hooks run is the same as without. It applies
    where autograd would add in place too and nothing looks at the new part alone: weights that are leaves with a
    contiguous .grad of their dtype and without hooks of their own (`Tensor.register_hook`; those that run after
    accumulation are no obstacle), in a `backward()` over the whole graph without create_graph. Everything else is as
    ever, `torch.autograd.grad` included. Two threads must not run backward passes over the same weights meanwhile. If
    such a pass fails, the gradients are undefined.
    """
    with _C.AccumulateInPlace():
        yield


def geglu_mlp(x: Tensor, w0: Tensor, w1: Tensor, wo: Tensor) -> Tensor:
    """`(gelu(x w0) * (x w1)) wo` with the tanh GELU (arXiv 2002.05202). x [..., D]; w0, w1 [D, F]; wo [F, D]."""
    return torch.ops.glam.geglu_mlp(x, w0, w1, wo)


# --- loss and router statistics


def linear_cross_entropy(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_cap: float = 0.0,
    vocab_start: int = 0,
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of logits `scale * hidden embedding^T` that never exist as [T, V].

    Args:
        hidden: [T, D].
        embedding: [V, D]; with `group` the rows of a split vocabulary from `vocab_start` on, equally many on each rank.
        targets: int64 [T] in [0, V).
        weights: [T] float32 (float64 with float64 hidden), 0 for padding; None: all 1.
        z_loss: adds z_loss * lse^2 to a token's loss.
        label_smoothing: the share of the target spread evenly over the vocabulary.
        logit_cap: c > 0 passes logits through c * tanh(logit / c).

    Returns: loss_sum [] (weighted; the only differentiable one: a gradient at the others raises), nll [T] (unweighted,
    without z-loss and smoothing) and lse [T], float32 (float64 for float64).
    """
    return torch.ops.glam.linear_cross_entropy(
        hidden, embedding, targets, weights, scale, z_loss, label_smoothing, logit_cap, vocab_start, group
    )


# --- weights for inference


def pack_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [K, N] or [E, K, N] in the order in which products with few rows read it, in bfloat16 or int8.

    linear, linear_wide, expert_mlp, moe_mlp and geglu_mlp take it where they take the plain weight; embedding and
    linear_cross_entropy take the packed table.t(). Nothing has a gradient then: an argument that wants one raises.
    With bfloat16 the results are, to the bit, those of the weight rounded to bfloat16. int8 is symmetric: a column's
    scale is its largest magnitude / 127, kept in float32; activations are not quantised, sums are float32.

    Args:
        weight: float32 or bfloat16; K even, N a multiple of 32; any strides.
        dtype: torch.bfloat16 gives [..., N / 32, K / 2, 64], torch.int8 [..., N / 32, 4 + K, 32], scales included.
    """
    return torch.ops.glam.pack_weight(weight, dtype)


def unpack_weight(packed: Tensor) -> Tensor:
    """The plain weight [..., K, N] that `pack_weight` made this of: bfloat16, or for int8 float32."""
    return torch.ops.glam.unpack_weight(packed)


def ordered_sum(x: Tensor) -> Tensor:
    """The sum of all elements in their order, computed in float64, [] in x's dtype; torch's depends on the threads."""
    return torch.ops.glam.ordered_sum(x)


def router_statistics(expert_ids: Tensor, positions: Tensor, num_experts: int) -> Tensor:
    """int64 [E + 6] counts from `top2_gating`'s expert_ids and positions.

    Rows of each expert, first choices over capacity, second choices over capacity, tokens with 0, 1 and 2 rows, real
    tokens: they add up over micro-batches and ranks.
    """
    return torch.ops.glam.router_statistics(expert_ids, positions, num_experts)


# --- norm, embedding and attention


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * scale over the last dimension, computed in float32 (float64 for float64).

    Args:
        x: [..., D]; the result has its shape and dtype.
        scale: [D], float32 or x's dtype; its gradient has its dtype.
    """
    return torch.ops.glam.rms_norm(x, scale, eps)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """[..., D]: row ids[...] of table [V, D], in the table's dtype.

    ids are int64 or int32 of any shape; one outside [0, V) raises on the CPU. The table's gradient is dense.
    """
    return torch.ops.glam.embedding(ids, table)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    segment_ids: Tensor | None = None,
    extra_logit: bool = True,
    logit_cap: float = 0.0,
) -> Tensor:
    """Causal attention with T5's bucketed relative bias and without 1/sqrt(A); never [S, S] in memory.

    Args:
        q, k, v: [B, S, H, A] of one dtype, which the result [B, S, H, A] has too.
        bias: [H, 32], one number per bucket of the distance, float32 or q's dtype.
        segment_ids: [B, S] int32. A position attends to its own segment; 0 is padding: not attended to, output 0.
        extra_logit: the denominator of every softmax has an extra exp(0).
        logit_cap: logits l become cap * tanh(l / cap); 0: as they are.
    """
    return torch.ops.glam.relative_attention(q, k, v, bias, segment_ids, extra_logit, logit_cap)


def relative_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    bias: Tensor,
    extra_logit: bool = True,
    logit_cap: float = 0.0,
) -> Tensor:
    """`relative_attention` of N new tokens per row over caches, which receive their k and v in place.

    The same bits as without a cache, however a row is cut into pieces. Not differentiable.

    Args:
        q, k, v: [B, N, H, A].
        k_cache, v_cache: [B, L, H, A] in q's dtype.
        positions: [B] int32, the index of each row's first new token; -1: a finished row, nothing is written and its
            output is 0. A row without room for N tokens raises on the CPU.
    """
    return torch.ops.glam.relative_attention_step(q, k, v, k_cache, v_cache, positions, bias, extra_logit, logit_cap)


def reorder_cache_(cache: Tensor, beams: Tensor) -> None:
    """cache[b] = old cache[beams[b]], in place and without a second copy. cache [B, ...], beams int64 [B]."""
    torch.ops.glam.reorder_cache_(cache, beams)


# --- random numbers and sampling


def counter_uniform(seed: int, stream: int, index: Tensor) -> Tensor:
    """Numbers in [0, 1), float32 in index's shape: a function of seed, stream and index (int64) alone.

    The first word of Philox 4x32-10 with key `seed` and counter (index, stream), its upper 24 bits over 2^24.
    """
    return torch.ops.glam.counter_uniform(seed, stream, index)


def sample_logits(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One token per row, int64 [B], by the inverse of the distribution function.

    Args:
        logits: [B, V] float32 or float64; -inf forbids a token, NaN raises on the CPU.
        uniform: [B] float32 in [0, 1), for instance from `counter_uniform`.
        temperature: logits are divided by it; 0 takes the largest logit, the lowest index among equals.
        top_k: only the k largest logits stay (lower indices first among equals); 0: all.
        top_p: of these, the fewest that hold at least top_p of the probability.
    """
    return torch.ops.glam.sample_logits(logits, uniform, temperature, top_k, top_p)


# --- optimiser steps: what glam_ext.optim is made of


def adafactor_sums(
    grads: Sequence[Tensor], weights: Sequence[Tensor], factored: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that an Adafactor update of P weights [..., R, C] begins with; shards of a split parameter are added.

    All of one dtype, float32 or float64, on one device; leading dimensions are a batch of N matrices. What these ops
    return holds the list's parameters one behind the other.

    Returns:
        row_sums [sum of N R] and col_sums [sum of N C] of grad^2, of the factored ones; weight_squares [P] float64.
    """
    return torch.ops.glam.adafactor_sums(grads, weights, factored)


def adafactor_stats_(
    row_vars: Sequence[Tensor],
    col_vars: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_sums: Tensor,
    col_sums: Tensor,
    step: Tensor,
    skip: Tensor | None,
    num_rows: Sequence[int],
    num_cols: Sequence[int],
    decay: float = -0.8,
    eps: float = 1e-30,
) -> tuple[Tensor, Tensor]:
    """Moves the second moments by the sums: rho = 1 - (step + 1)^decay of the old, 1 - rho of mean(grad^2) + eps.

    Args:
        row_vars, col_vars: [..., R] and [..., C]; or the full variance and [0] of a parameter that is not factored.
        step: [] int64, updates applied before.
        skip: [] bool or None; where it is true nothing changes.
        num_rows, num_cols: R and C of the whole parameters; not read of those that are not factored.

    Returns:
        row_means, the sums of row_var / num_rows, and scaled_squares, those of grad^2 / (row_var col_var), of each
        matrix: [sum of N] float64. A parameter that is not factored has one, 1 and the sum of grad^2 / variance.
    """
    return torch.ops.glam.adafactor_stats_(
        row_vars, col_vars, grads, row_sums, col_sums, step, skip, num_rows, num_cols, decay, eps
    )


def adafactor_update_squares(row_means: Tensor, scaled_squares: Tensor, num_matrices: Sequence[int]) -> Tensor:
    """The sum of row_means * scaled_squares over each parameter's matrices: [P] float64.

    Args:
        num_matrices: N of each parameter, 1 if it is not factored.
    """
    return torch.ops.glam.adafactor_update_squares(row_means, scaled_squares, num_matrices)


def adafactor_apply_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    row_vars: Sequence[Tensor],
    col_vars: Sequence[Tensor],
    row_means: Tensor,
    weight_squares: Tensor,
    update_squares: Tensor,
    lr: Tensor,
    skip: Tensor | None,
    num_elements: Sequence[int],
    clipping: float = 1.0,
    min_scale: float = 1e-3,
) -> None:
    """weight -= lr * max(RMS(weight), min_scale) * u / max(1, RMS(u) / clipping), u being grad over its root moments.

    Args:
        row_means, weight_squares, update_squares: from the ops before, summed over shards.
        lr: scalar tensor.
        skip: as above.
        num_elements: of the whole parameters.
    """
    torch.ops.glam.adafactor_apply_(
        weights,
        grads,
        row_vars,
        col_vars,
        row_means,
        weight_squares,
        update_squares,
        lr,
        skip,
        num_elements,
        clipping,
        min_scale,
    )


def squared_norm(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each of P tensors the sum of x^2, [P] float64, and whether some square is infinite or NaN, [P] bool.

    Sums have a fixed order. Dtypes may differ; float16 and bfloat16 are squared in float32.
    """
    return torch.ops.glam.squared_norm(xs)
