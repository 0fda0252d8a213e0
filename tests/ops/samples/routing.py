"""Samples of the ops that follow a routing plan: routing_plan, dispatch, combine, expert_mlp, moe_mlp, exchange,
exchange_mlp.

Ids and positions look as a gate could have made them, with every kind of dropped choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.reference import gating, routing

from .base import Args, Op, Outputs, Sample, first_dim_row, one_output, randint, randn, uniform, weight_dtype


def routed(
    name: str, tokens: int, experts: int, choices: int = 2, group: int = -1, slots: int = -1, skip: int = -1
) -> tuple[Tensor, Tensor]:
    """expert_ids and positions [T, K] int32; expert `skip` gets no token; about one choice in eight is dropped."""
    ids = randint(name + "ids", experts, tokens, choices, dtype=torch.int32)
    if skip >= 0:
        ids[ids == skip] = (skip + 1) % experts
    dropped = randint(name + "drop", 8, tokens, choices) == 0
    codes = randint(name + "code", 0, tokens, choices, dtype=torch.int32, low=-3)
    positions = torch.zeros(tokens, choices, dtype=torch.int32)
    group = max(1, tokens if group == -1 else group)
    used: dict[tuple[int, int], int] = {}
    for k in range(choices):
        for t in range(tokens):
            key = (t // group, int(ids[t, k]))
            if dropped[t, k]:
                positions[t, k] = codes[t, k]
            elif slots >= 0 and used.get(key, 0) >= slots:
                positions[t, k] = gating.OVER_CAPACITY
            else:
                positions[t, k] = used.get(key, 0)
                used[key] = used.get(key, 0) + 1
    return ids, positions


def plan_of(
    name: str, tokens: int, experts: int, choices: int = 2, group: int = -1, slots: int = -1, skip: int = -1
) -> Outputs:
    ids, positions = routed(name, tokens, experts, choices, group, slots, skip)
    return routing.routing_plan(ids, positions, experts, group, slots)


def _plan_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, t: int, e: int, k: int = 2, group: int = -1, slots: int = -1, skip: int = -1) -> Sample:
        ids, positions = routed(name, t, e, k, group, slots, skip)
        return Sample(name, (ids, positions, e, group, slots))

    if level == "small":
        return [
            sample("tight", 11, 4),
            sample("tight, three choices", 10, 4, k=3),
            sample("slotted", 12, 3, group=6, slots=2),
            sample("slotted, one group", 9, 4, slots=5),
        ]
    if level == "tiles":
        sizes = [(15, 4), (16, 5), (17, 3), (31, 8), (33, 7), (255, 16), (257, 9)]
        return [sample(f"T={t} E={e}", t, e) for t, e in sizes] + [
            sample(f"T={t} E={e} S={s} C={c}", t, e, group=s, slots=c)
            for t, e, s, c in [(30, 4, 15, 3), (34, 5, 17, 8), (256, 7, 64, 9)]
        ]
    if level == "cuda":
        return [
            sample("T=1100", 1100, 7),
            sample("E=1025", 300, 1025),
            sample("T=1100, slotted", 1100, 7, group=550, slots=100),
        ]
    if level == "edges":
        return [
            sample("no token", 0, 3),
            sample("no token, slotted", 0, 3, group=4, slots=2),
            sample("one token", 1, 4),
            sample("one choice", 6, 4, k=1),
            sample("one expert", 7, 1),
            sample("empty expert", 12, 3, skip=1),
            sample("empty expert, slotted", 12, 3, group=4, slots=4, skip=2),
        ]
    return [sample("large", 3000, 16), sample("large, slotted", 3000, 16, group=500, slots=40)]


ROUTING_PLAN = Op("routing_plan", routing.routing_plan, _plan_samples, differentiable=(), has_cuda=True)


def _routes(level: str) -> list[tuple[str, int, int, Outputs]]:
    """(name, T, E, plan) for the ops that follow a plan."""
    if level == "small":
        return [
            ("tight", 7, 3, plan_of("tight", 7, 3)),
            ("slotted", 8, 3, plan_of("slotted", 8, 3, group=4, slots=3)),
            ("three choices", 5, 4, plan_of("three", 5, 4, choices=3)),
        ]
    if level == "tiles":
        return [
            (f"T={t} E={e}", t, e, plan_of(f"T={t}", t, e)) for t, e in [(9, 4), (16, 3), (33, 5), (64, 2), (129, 3)]
        ]
    if level == "cuda":
        return [("E=65", 90, 65, plan_of("E=65", 90, 65))]
    if level == "edges":
        return [
            ("no token", 0, 3, plan_of("none", 0, 3)),
            ("one token", 1, 3, plan_of("one", 1, 3)),
            ("one expert", 6, 1, plan_of("one expert", 6, 1)),
            ("all to one", 9, 3, _all_to_one()),
            ("empty expert", 11, 4, plan_of("empty", 11, 4, skip=2)),
            ("nothing kept", 5, 3, _nothing_kept(5, 3)),
        ]
    return [("large", 700, 8, plan_of("large", 700, 8))]


def _nothing_kept(tokens: int, experts: int) -> Outputs:
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    return routing.routing_plan(ids, torch.full_like(ids, gating.OVER_CAPACITY), experts)


def _all_to_one() -> Outputs:
    ids = torch.full((9, 2), 1, dtype=torch.int32)
    return routing.routing_plan(ids, torch.arange(18, dtype=torch.int32).reshape(9, 2), 3)


WIDTHS = {"small": [5], "tiles": [31, 8, 17, 33, 16], "edges": [6, 9, 1, 7, 3, 5], "large": [96], "cuda": [9]}
HIDDEN = {"small": [4], "tiles": [15, 33, 32, 7, 65], "edges": [5, 3, 8, 1, 9, 4], "large": [130], "cuda": [5]}


def _width(table: dict[str, list[int]], level: str, index: int) -> int:
    return table[level][index % len(table[level])]


def _dispatch_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    return [
        Sample(name, (randn(name, t, _width(WIDTHS, level, n), dtype=dtype), *plan), (0,))
        for n, (name, t, _, plan) in enumerate(_routes(level))
    ]


def gates_of(name: str, plan: Outputs, dtype: torch.dtype) -> Tensor:
    """Positive weights, 0 where the choice has no row, in float32 (float64 for float64)."""
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (0.05 + uniform(name + "gates", *plan[0].shape)).to(gate_dtype) * (plan[0] >= 0)


def _combine_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    samples = []
    for n, (name, _, _, plan) in enumerate(_routes(level)):
        rows = randn(name, plan[1].shape[0], _width(WIDTHS, level, n), dtype=dtype)
        samples.append(Sample(name, (rows, gates_of(name, plan, dtype), *plan), (0, 1)))
    return samples


def _combine_alone(args: Args, i: int) -> Args:
    rows, gates, row_of_choice, choice_of_row, offsets = args
    alone = torch.full_like(choice_of_row, -1)
    num_choices = row_of_choice.shape[1]
    for k in range(num_choices):
        if row_of_choice[i, k] >= 0:
            alone[row_of_choice[i, k]] = k
    return rows, gates[i : i + 1], row_of_choice[i : i + 1], alone, offsets


DISPATCH = Op("dispatch", one_output(routing.dispatch), _dispatch_samples, has_cuda=True)
COMBINE = Op(
    "combine",
    one_output(routing.combine),
    _combine_samples,
    alone=_combine_alone,
    row=first_dim_row,
    has_cuda=True,
)


# Experts: two or three weights [E, D, F], [E, F, D].


def _expert_weights(name: str, e: int, d: int, f: int, activation: str, dtype: torch.dtype) -> list[Tensor | None]:
    wi = randn(name + "wi", e, d, f, dtype=dtype, scale=d**-0.5)
    wo = randn(name + "wo", e, f, d, dtype=dtype, scale=f**-0.5)
    return [wi, wo, randn(name + "wg", e, d, f, dtype=dtype, scale=d**-0.5) if activation == "geglu" else None]


ACTIVATIONS = ("relu", "gelu", "geglu")


def _expert_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, offsets: Sequence[int], rows: int, e: int, d: int, f: int, activation: str) -> Sample:
        name = f"{name} {activation}"
        weights = _expert_weights(name, e, d, f, activation, weight_dtype(dtype))
        wants = (0, 2, 3, 4) if activation == "geglu" else (0, 2, 3)
        bounds = torch.tensor(offsets, dtype=torch.int32)
        return Sample(name, (randn(name, rows, d, dtype=dtype), bounds, *weights, activation), wants)

    if level == "small":
        return [
            *(sample("three experts", [0, 3, 3, 8], 11, 3, 5, 4, activation) for activation in ACTIVATIONS),
            sample("six segments of three experts", [0, 1, 3, 3, 4, 6, 9], 9, 3, 4, 7, "relu"),
        ]
    if level == "tiles":
        sizes = [
            ([0, 3, 8, 15], 17, 31, 33),
            ([0, 16, 33, 49], 7, 15, 17),
            ([0, 31, 32, 65], 16, 9, 8),
            ([0, 5, 5, 6], 5, 65, 63),
            ([0, 255, 255, 260], 3, 17, 33),
            ([0, 1, 258, 258], 4, 16, 7),
            ([0, 4, 7, 16], 9, 257, 31),
            ([0, 7, 9, 17], 5, 33, 255),
        ]
        return [
            sample(f"{offsets} D={d} F={f}", offsets, offsets[-1] + unused, 3, d, f, ACTIVATIONS[index % 3])
            for index, (offsets, unused, d, f) in enumerate(sizes)
        ]
    if level == "cuda":
        return [
            sample("66 segments", [0, *(3 * n // 2 for n in range(66))], 100, 33, 5, 3, "geglu"),
            sample("33 experts", [2 * n for n in range(34)], 66, 33, 5, 7, "gelu"),
        ]
    if level == "edges":
        return [
            sample("no row", [0, 0, 0], 0, 2, 5, 3, "relu"),
            sample("no row used", [0, 0, 0], 4, 2, 5, 3, "geglu"),
            sample("one row", [0, 0, 1], 1, 2, 5, 3, "gelu"),
            sample("one expert", [0, 7], 7, 1, 3, 6, "geglu"),
            sample("all to one", [0, 0, 9, 9], 9, 3, 1, 4, "relu"),
            sample("width one", [0, 2, 5], 6, 2, 3, 1, "gelu"),
        ]
    return [sample("large", [0, 150, 420, 421, 700], 720, 4, 96, 130, a) for a in ("relu", "geglu")]


def _expert_alone(args: Args, i: int) -> Args:
    rows, offsets, *weights = args
    alone = torch.tensor([min(max(int(offset) - i, 0), 1) for offset in offsets], dtype=torch.int32)
    return (rows[i : i + 1], alone, *weights)


def _moe_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    samples = []
    for n, (route, t, e, plan) in enumerate(_routes(level)):
        activations = ACTIVATIONS if level == "small" else (ACTIVATIONS[n % 3],)
        for activation in activations:
            name, d, f = f"{route} {activation}", _width(WIDTHS, level, n), _width(HIDDEN, level, n)
            weights = _expert_weights(name, e, d, f, activation, weight_dtype(dtype))
            wants = (0, 1, 5, 6, 7) if activation == "geglu" else (0, 1, 5, 6)
            x = randn(name, t, d, dtype=dtype)
            samples.append(Sample(name, (x, gates_of(name, plan, dtype), *plan, *weights, activation), wants))
    return samples


def _moe_alone(args: Args, i: int) -> Args:
    x, gates, row_of_choice, _, offsets, *weights = args
    ids = torch.zeros(1, row_of_choice.shape[1], dtype=torch.int32)
    positions = torch.full_like(ids, -1)
    for k in range(row_of_choice.shape[1]):
        row = int(row_of_choice[i, k])
        if row >= 0:
            ids[0, k] = sum(1 for offset in offsets[1:] if int(offset) <= row)
            positions[0, k] = 0
    plan = routing.routing_plan(ids, positions, offsets.shape[0] - 1)
    return (x[i : i + 1], gates[i : i + 1], *plan, *weights)


EXPERT_MLP = Op(
    "expert_mlp",
    one_output(routing.expert_mlp),
    _expert_samples,
    weights=(2, 3, 4),
    alone=_expert_alone,
    row=first_dim_row,
    has_cuda=True,
)
MOE_MLP = Op(
    "moe_mlp",
    one_output(routing.moe_mlp),
    _moe_samples,
    weights=(5, 6, 7),
    alone=_moe_alone,
    row=first_dim_row,
    has_cuda=True,
)


# Exchange, in one process.


def _exchange_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    sizes = {
        "small": [(6, 5, [], []), (6, 5, [4], [4])],
        "tiles": [(33, 17, [31], [31]), (16, 9, [], [])],
        "edges": [(0, 3, [], []), (4, 3, [0], [0]), (4, 3, [4], [4])],
        "large": [(1000, 64, [900], [900])],
    }
    return [
        Sample(f"R={r} D={d} {o}", (randn(f"{r}{d}", r, d, dtype=dtype), o, i, ""), (0,)) for r, d, o, i in sizes[level]
    ]


EXCHANGE = Op("exchange", lambda rows, out, into, group: (routing.exchange(rows, out, into),), _exchange_samples)


# Experts behind an exchange, in one process: what is sent comes back, so it equals expert_mlp.


def _splits(offsets: Sequence[int], experts: int, chunks: int) -> list[int]:
    return [
        int(offsets[end] - offsets[end - experts // chunks])
        for end in range(experts // chunks, experts + 1, experts // chunks)
    ]


def _exchange_mlp_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    def sample(
        name: str, offsets: Sequence[int], rows: int, e: int, d: int, f: int, activation: str, chunks: int
    ) -> Sample:
        name = f"{name} {activation} chunks={chunks}"
        weights = _expert_weights(name, e, d, f, activation, weight_dtype(dtype))
        wants = (0, 4, 5, 6) if activation == "geglu" else (0, 4, 5)
        bounds, splits = torch.tensor(offsets, dtype=torch.int32), _splits(offsets, e, chunks)
        if level == "small" and rows == offsets[-1] and len(set(splits)) == 1:
            splits = []
        return Sample(
            name, (randn(name, rows, d, dtype=dtype), bounds, splits, splits, *weights, activation, "", chunks), wants
        )

    if level == "small":
        return [
            *(sample("four experts", [0, 3, 3, 8, 9], 11, 4, 5, 3, activation, 2) for activation in ACTIVATIONS),
            sample("equal", [0, 2, 4, 6, 8], 8, 4, 3, 5, "relu", 4),
            sample("one chunk", [0, 2, 5], 6, 2, 3, 5, "relu", 1),
        ]
    if level == "tiles":
        return [
            sample("tiles", [0, 3, 8, 15, 32], 34, 4, 31, 17, "relu", 2),
            sample("tiles", [0, 16, 33, 33, 49], 49, 4, 15, 33, "geglu", 4),
        ]
    if level == "edges":
        return [
            sample("no row", [0, 0, 0], 0, 2, 5, 3, "relu", 2),
            sample("no row sent", [0, 0, 0], 4, 2, 5, 3, "geglu", 2),
            sample("all to one", [0, 0, 9, 9, 9], 9, 4, 3, 2, "gelu", 2),
        ]
    return [sample("large", [0, 150, 420, 421, 700], 720, 4, 96, 130, "relu", 2)]


def _exchange_mlp_reference(*args: Any) -> Tensor:
    rows, offsets, _, _, wi, wo, wg, activation, _, _ = args
    return routing.expert_mlp(rows, offsets, wi, wo, wg, activation)


def _exchange_mlp_alone(args: Args, i: int) -> Args:
    rows, offsets, _, _, *weights, activation, group, chunks = args
    alone = torch.tensor([min(max(int(offset) - i, 0), 1) for offset in offsets], dtype=torch.int32)
    splits = _splits(alone.tolist(), len(offsets) - 1, chunks)
    return (rows[i : i + 1], alone, splits, splits, *weights, activation, group, chunks)


EXCHANGE_MLP = Op(
    "exchange_mlp",
    one_output(_exchange_mlp_reference),
    _exchange_mlp_samples,
    weights=(4, 5, 6),
    alone=_exchange_mlp_alone,
    row=first_dim_row,
)
