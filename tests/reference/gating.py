"""Top-2 gating, twice: one loop per token (values), and one formula in torch (gradients).

Letters: T tokens, E experts, G groups of S = group_size consecutive tokens. All in float64.
Position codes: >= 0 the slot within (group, expert), -1 masked or skipped by the policy, -2 over capacity,
-3 the gate is exactly zero (the slot is used up, the token gets no row); -2 wins over -3.
Source: GShard (arXiv 2006.16668) algorithm 1 with the choices of praxis' top2_gating_on_logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED, OVER_CAPACITY, UNDERFLOW = -1, -2, -3
FLT_MAX = 3.4028234663852886e38
TINY = 1e-9


@dataclass(frozen=True)
class Gating:
    """gates [T, 2] float64, expert_ids [T, 2] int32, positions [T, 2] int32, aux_loss [G] float64."""

    gates: Tensor
    expert_ids: Tensor
    positions: Tensor
    aux_loss: Tensor

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.gates, self.expert_ids, self.positions, self.aux_loss


def capacity_of(group_size: int, capacity_factor: float, num_experts: int) -> int:
    """int(group_size * cf / E), at least 1, and a multiple of 4 when above 1; a factor <= 0 drops nothing (-1)."""
    if capacity_factor <= 0:
        return -1
    capacity = int(group_size * capacity_factor / num_experts)
    if capacity <= 1:
        return 1
    while capacity % 4 != 0:
        capacity += 1
    return capacity


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    total = sum(weights)
    return [w / total for w in weights]


def _first_largest(values: list[float]) -> int:
    best = 0
    for index, value in enumerate(values):
        if value > values[best]:
            best = index
    return best


def _gumbel(uniform: float) -> float:
    if uniform <= 0.0:
        return -math.inf
    if uniform >= 1.0:
        return math.inf
    return -math.log(-math.log(uniform))


def top2_gating(
    logits: Tensor,
    token_mask: Tensor | None = None,
    noise: Tensor | None = None,
    group_size: int = -1,
    capacity: int = -1,
    second_policy: str = "all",
    second_threshold: float = 0.0,
    normalize_before_capacity: bool = True,
) -> Gating:
    """The gate of one layer, token by token: logits [T, E] any float type, token_mask [T] bool, noise [T] or [T, E]."""
    num_tokens, num_experts = logits.shape
    group_size = num_tokens if group_size == -1 else group_size
    num_groups = num_tokens // group_size if group_size > 0 else 1
    unlimited = capacity == -1
    gates = torch.zeros(num_tokens, 2, dtype=torch.float64)
    ids = torch.zeros(num_tokens, 2, dtype=torch.int32)
    positions = torch.full((num_tokens, 2), MASKED, dtype=torch.int32)
    aux = torch.zeros(num_groups, dtype=torch.float64)

    for group in range(num_groups):
        tokens = range(group * group_size, (group + 1) * group_size)
        raw: dict[int, list[float]] = {}  # token -> [first gate, second gate] before capacity
        wants_second: dict[int, bool] = {}
        first_count = [0.0] * num_experts
        probability_sum = [0.0] * num_experts

        # Choices and gates of each token.
        for t in tokens:
            z = [float(v) for v in logits[t].double()]
            real = token_mask is None or bool(token_mask[t])
            if not all(math.isfinite(v) for v in z):
                ids[t, 0], ids[t, 1] = 0, min(1, num_experts - 1)
                if real:
                    raw[t], wants_second[t] = [math.nan, math.nan], True
                    first_count[0] += 1
                    probability_sum = [math.nan] * num_experts
                continue
            p = _softmax(z)
            first = _first_largest(p)
            rest = [0.0 if e == first and real else value for e, value in enumerate(p)]
            if second_policy == "sampling":
                assert noise is not None
                perturbed = [-0.7 * FLT_MAX if e == first else z[e] for e in range(num_experts)]
                perturbed = [value + _gumbel(float(noise[t, e])) for e, value in enumerate(perturbed)]
                second = _first_largest(perturbed)
            else:
                second = _first_largest(rest)
            ids[t, 0], ids[t, 1] = first, second
            if not real:
                continue
            g1, g2 = p[first], rest[second]
            normalised_second = g2 / (g1 + g2 + TINY)
            keep = True
            if second_policy == "random":
                assert noise is not None
                keep = float(noise[t]) * max(second_threshold, TINY) < normalised_second
            if normalize_before_capacity:
                raw[t] = [g1 / (g1 + g2 + TINY), normalised_second]
            else:
                raw[t] = [g1, g2]
            wants_second[t] = keep
            first_count[first] += 1
            for e in range(num_experts):
                probability_sum[e] += p[e]

        # Capacity: every first choice of the group comes before any second choice.
        used = [0] * num_experts
        for t in tokens:
            if t in raw:
                expert = int(ids[t, 0])
                if unlimited or used[expert] < capacity:
                    positions[t, 0] = used[expert]
                    used[expert] += 1
                else:
                    positions[t, 0] = OVER_CAPACITY
        for t in tokens:
            if t in raw and wants_second[t]:
                expert = int(ids[t, 1])
                if unlimited or used[expert] < capacity:
                    positions[t, 1] = used[expert] if raw[t][1] != 0.0 else UNDERFLOW
                    used[expert] += 1
                else:
                    positions[t, 1] = OVER_CAPACITY

        for t in tokens:
            if t in raw:
                kept = [raw[t][k] if positions[t, k] >= 0 else 0.0 for k in range(2)]
                total = kept[0] + kept[1]
                if not normalize_before_capacity and (total > 0.0 or math.isnan(total)):
                    kept = [value / total for value in kept]
                gates[t] = torch.tensor(kept, dtype=torch.float64)

        if group_size > 0:
            aux[group] = num_experts * sum(
                (first_count[e] / group_size) * (probability_sum[e] / group_size) for e in range(num_experts)
            )
    return Gating(gates, ids, positions, aux)


def gates_and_aux(
    logits: Tensor,
    expert_ids: Tensor,
    positions: Tensor,
    token_mask: Tensor | None = None,
    group_size: int = -1,
    normalize_before_capacity: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same gates [T, 2] and aux [G] as a formula of the logits, the discrete decisions held fixed; for autograd."""
    num_tokens, num_experts = logits.shape
    group_size = num_tokens if group_size == -1 else group_size
    num_groups = num_tokens // group_size if group_size > 0 else 1
    real_T1 = torch.ones(num_tokens, 1, dtype=torch.float64)
    if token_mask is not None:
        real_T1 = token_mask.double().unsqueeze(1)
    p_TE = torch.softmax(logits.double(), dim=1)
    one_hot_TKE = torch.nn.functional.one_hot(expert_ids.long(), num_experts).double()
    first_TE = one_hot_TKE[:, 0] * real_T1
    g1_T = torch.einsum("te,te->t", p_TE, first_TE)
    g2_T = torch.einsum("te,te->t", p_TE * (1 - first_TE), one_hot_TKE[:, 1] * real_T1)
    kept_TK = (positions >= 0).double()
    if normalize_before_capacity:
        gates_TK = torch.stack([g1_T, g2_T], dim=1) / (g1_T + g2_T + TINY).unsqueeze(1) * kept_TK
    else:
        gates_TK = torch.stack([g1_T, g2_T], dim=1) * kept_TK
        total_T1 = gates_TK.sum(dim=1, keepdim=True)
        gates_TK = gates_TK / torch.where(total_T1 > 0, total_T1, torch.ones_like(total_T1))
    fraction_GE = first_TE.reshape(num_groups, group_size, num_experts).sum(dim=1) / max(group_size, 1)
    mean_GE = (p_TE * real_T1).reshape(num_groups, group_size, num_experts).sum(dim=1) / max(group_size, 1)
    return gates_TK, num_experts * torch.einsum("ge,ge->g", fraction_GE, mean_GE)
