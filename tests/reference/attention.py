"""Attention with bucketed relative bias, dense S x S in float64, and its cached form.

Letters: B sequences, S positions, H heads, A head dim. No 1/sqrt(A); logits = q k + bias[bucket(distance)], optional
tanh cap, then the mask (causal, same non-zero segment), then a softmax whose denominator has an extra exp(0).
Source: praxis attentions.py (RelativeBias, attention_extra_logit); the buckets are T5's for one direction, as a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_BUCKETS = 32
# The smallest distance of each bucket: one bucket per distance below 16, then logarithmic up to 128.
FIRST_DISTANCE = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def bucket(distance: int) -> int:
    """The bucket of a distance query position - key position >= 0."""
    assert distance >= 0
    return max(b for b in range(NUM_BUCKETS) if FIRST_DISTANCE[b] <= distance)


def _attend(
    q_NHA: Tensor,
    k_MHA: Tensor,
    v_MHA: Tensor,
    bias: Tensor,
    allowed_NM: Tensor,
    distance_NM: Tensor,
    extra_logit: bool,
    logit_cap: float,
) -> Tensor:
    buckets = torch.tensor([[bucket(max(int(n), 0)) for n in row] for row in distance_NM], dtype=torch.long)
    logits_HNM = torch.einsum("nha,mha->hnm", q_NHA, k_MHA) + bias[:, buckets.reshape(distance_NM.shape)]
    if logit_cap > 0:
        logits_HNM = logit_cap * torch.tanh(logits_HNM / logit_cap)
    logits_HNM = logits_HNM.masked_fill(~allowed_NM, float("-inf"))
    if extra_logit:
        logits_HNM = torch.cat([logits_HNM, torch.zeros_like(logits_HNM[:, :, :1])], dim=2)
    none_allowed_N = ~allowed_NM.any(dim=1)
    p_HNM = torch.softmax(logits_HNM.masked_fill(none_allowed_N[:, None], 0.0), dim=2)
    p_HNM = p_HNM[:, :, : allowed_NM.shape[1]] * allowed_NM
    return torch.einsum("hnm,mha->nha", p_HNM, v_MHA)


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    segment_ids: Tensor | None = None,
    extra_logit: bool = True,
    logit_cap: float = 0.0,
) -> Tensor:
    """o [B, S, H, A]; segment_ids [B, S], 0 is padding: attends to nothing, is not attended to, output 0."""
    q, k, v, bias = q.double(), k.double(), v.double(), bias.double()
    num_positions = q.shape[1]
    index = torch.arange(num_positions)
    distance = index[:, None] - index[None, :]
    outputs = []
    for b in range(q.shape[0]):
        segment = torch.ones(num_positions) if segment_ids is None else segment_ids[b]
        allowed = (distance >= 0) & (segment[:, None] == segment[None, :]) & (segment[:, None] != 0)
        outputs.append(_attend(q[b], k[b], v[b], bias, allowed, distance, extra_logit, logit_cap))
    return torch.stack(outputs) if outputs else torch.zeros_like(q)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """o [B, N, H, A] and the two new caches; positions [B] is the index of the first new token, -1 a finished row."""
    q, k, v, bias = q.double(), k.double(), v.double(), bias.double()
    k_cache, v_cache = k_cache.double().clone(), v_cache.double().clone()
    num_new = q.shape[1]
    output = torch.zeros_like(q)
    for b in range(q.shape[0]):
        start = int(positions[b])
        if start < 0 or num_new == 0:
            continue
        end = start + num_new
        k_cache[b, start:end] = k[b]
        v_cache[b, start:end] = v[b]
        distance = torch.arange(start, end)[:, None] - torch.arange(end)[None, :]
        output[b] = _attend(
            q[b], k_cache[b, :end], v_cache[b, :end], bias, distance >= 0, distance, extra_logit, logit_cap
        )
    return output, k_cache, v_cache
