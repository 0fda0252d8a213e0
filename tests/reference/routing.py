"""Routing plan, dispatch, combine and expert feed-forwards, one row at a time in float64.

Letters: T tokens, K choices, R rows, E experts, G groups, C slots per (group, expert), D model dim, F hidden dim.
Every function is differentiable by autograd in its floating inputs. Sources: GShard (arXiv 2006.16668) algorithm 1,
GLaM (arXiv 2112.06905) section 4; experts are act(x wi) wo, or gelu(x wg) * (x wi) wo.
"""

from __future__ import annotations

import torch
from torch import Tensor


def routing_plan(
    expert_ids: Tensor, positions: Tensor, num_experts: int, group_size: int = -1, slots: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """row_of_choice [T, K], choice_of_row [R], offsets [E + 1], all int32; -1 marks none."""
    num_tokens, num_choices = expert_ids.shape
    group_size = num_tokens if group_size == -1 else group_size
    row_of_choice = torch.full((num_tokens, num_choices), -1, dtype=torch.int32)
    if slots == -1:
        choice_of_row = torch.full((num_tokens * num_choices,), -1, dtype=torch.int32)
        offsets = [0]
        row = 0
        for expert in range(num_experts):
            for t in range(num_tokens):
                for k in range(num_choices):
                    if int(expert_ids[t, k]) == expert and int(positions[t, k]) >= 0:
                        row_of_choice[t, k] = row
                        choice_of_row[row] = t * num_choices + k
                        row += 1
            offsets.append(row)
        return row_of_choice, choice_of_row, torch.tensor(offsets, dtype=torch.int32)

    num_groups = num_tokens // group_size if group_size > 0 else 0
    choice_of_row = torch.full((num_experts * num_groups * slots,), -1, dtype=torch.int32)
    for t in range(num_tokens):
        for k in range(num_choices):
            position = int(positions[t, k])
            if position >= 0:
                row = (int(expert_ids[t, k]) * num_groups + t // group_size) * slots + position
                row_of_choice[t, k] = row
                choice_of_row[row] = t * num_choices + k
    offsets_E1 = [expert * num_groups * slots for expert in range(num_experts + 1)]
    return row_of_choice, choice_of_row, torch.tensor(offsets_E1, dtype=torch.int32)


def dispatch(x: Tensor, row_of_choice: Tensor, choice_of_row: Tensor, offsets: Tensor) -> Tensor:
    """rows [R, D]: the token of each row, zeros in an empty one."""
    num_choices = row_of_choice.shape[1]
    rows = [
        x[int(choice) // num_choices].double() if choice >= 0 else torch.zeros(x.shape[1], dtype=torch.float64)
        for choice in choice_of_row
    ]
    return torch.stack(rows) if rows else torch.zeros(0, x.shape[1], dtype=torch.float64)


def combine(rows: Tensor, gates: Tensor, row_of_choice: Tensor, choice_of_row: Tensor, offsets: Tensor) -> Tensor:
    """y [T, D] = sum over the choices that have a row of gate * row."""
    y = []
    for t in range(row_of_choice.shape[0]):
        total = torch.zeros(rows.shape[1], dtype=torch.float64)
        for k in range(row_of_choice.shape[1]):
            row = int(row_of_choice[t, k])
            if row >= 0:
                total = total + gates[t, k].double() * rows[row].double()
        y.append(total)
    return torch.stack(y) if y else torch.zeros(0, rows.shape[1], dtype=torch.float64)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def expert(x: Tensor, wi: Tensor, wo: Tensor, wg: Tensor | None, activation: str) -> Tensor:
    """One expert on [..., D], weights [D, F] and [F, D]."""
    x, wi, wo = x.double(), wi.double(), wo.double()
    if activation == "relu":
        hidden = (x @ wi).clamp_min(0)
    elif activation == "gelu":
        hidden = gelu(x @ wi)
    else:
        assert activation == "geglu"
        assert wg is not None
        hidden = gelu(x @ wg.double()) * (x @ wi)
    return hidden @ wo


def expert_mlp(rows: Tensor, offsets: Tensor, wi: Tensor, wo: Tensor, wg: Tensor | None, activation: str) -> Tensor:
    """Segment s of the rows goes through expert s mod E_local; rows after the last offset give zeros."""
    num_experts = wi.shape[0]
    out = [torch.zeros(wo.shape[2], dtype=torch.float64) for _ in range(rows.shape[0])]
    for segment in range(len(offsets) - 1):
        e = segment % num_experts
        for row in range(int(offsets[segment]), int(offsets[segment + 1])):
            out[row] = expert(rows[row], wi[e], wo[e], None if wg is None else wg[e], activation)
    return torch.stack(out) if out else torch.zeros(0, wo.shape[2], dtype=torch.float64)


def moe_mlp(
    x: Tensor,
    gates: Tensor,
    row_of_choice: Tensor,
    choice_of_row: Tensor,
    offsets: Tensor,
    wi: Tensor,
    wo: Tensor,
    wg: Tensor | None,
    activation: str,
) -> Tensor:
    """y [T, D] = sum over the choices that have a row of gate * expert(x)."""
    y = []
    for t in range(x.shape[0]):
        total = torch.zeros(wo.shape[2], dtype=torch.float64)
        for k in range(row_of_choice.shape[1]):
            row = int(row_of_choice[t, k])
            if row >= 0:
                segment = sum(1 for offset in offsets[1:] if int(offset) <= row)
                e = segment % wi.shape[0]
                weight = None if wg is None else wg[e]
                total = total + gates[t, k].double() * expert(x[t], wi[e], wo[e], weight, activation)
        y.append(total)
    return torch.stack(y) if y else torch.zeros(0, wo.shape[2], dtype=torch.float64)


def geglu_mlp(x: Tensor, w0: Tensor, w1: Tensor, wo: Tensor) -> Tensor:
    """GLaM's dense feed-forward: the activated branch is w0."""
    x = x.double()
    return (gelu(x @ w0.double()) * (x @ w1.double())) @ wo.double()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight, the weight being [in, out]."""
    return torch.einsum("...d,df->...f", x.double(), weight.double())


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """The row of each id, by a one-hot product so that the gradient is plain."""
    return torch.nn.functional.one_hot(ids.long(), table.shape[0]).double() @ table.double()


def exchange(rows: Tensor, out_splits: list[int], in_splits: list[int]) -> Tensor:
    """One process alone: what is sent comes back; empty splits mean all rows."""
    assert sum(out_splits) == sum(in_splits)
    return rows[: sum(in_splits)] if in_splits else rows
