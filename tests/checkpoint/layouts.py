"""A model's whole state, and what each rank of a layout holds of it.

A layout is (expert ranks, tensor ranks, data ranks). Experts are split over the first, along dimension 0, unevenly
where they do not divide; their hidden dimension over the second; the third holds replicas. Everything else is on all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glam_ext.checkpoint import Piece, load_checkpoint, save_checkpoint
from glam_ext.checkpoint.load import PartOf
from glam_ext.config import GLaMConfig
from glam_ext.distributed.ranks import Ranks
from glam_ext.model import GLaM
from glam_ext.optim import Adafactor
from tests.checkpoint.thread_ranks import succeed

CONFIG = GLaMConfig.preset("tiny", model_dim=16, hidden_dim=24, num_heads=2, head_dim=4, vocab_size=40)
assert CONFIG.num_experts == 4

Layout = tuple[int, int, int]
ONE: Layout = (1, 1, 1)
TWO: Layout = (2, 1, 1)
UNEVEN_THREE: Layout = (3, 1, 1)
FOUR: Layout = (4, 1, 1)
REPLICAS: Layout = (2, 1, 2)
TWO_DIMENSIONS: Layout = (2, 2, 1)
MORE_THAN_EXPERTS: Layout = (6, 1, 1)
LAYOUTS = [ONE, TWO, UNEVEN_THREE, FOUR, REPLICAS, TWO_DIMENSIONS, MORE_THAN_EXPERTS]

State = tuple[dict[str, Tensor], dict[str, Tensor]]
TRAINER = {"tokens": 7, "optimizer": "adafactor"}


def whole_state(seed: int = 0) -> State:
    """Weights, and Adafactor's state after an update: row_var, col_var, variance and "step"."""
    model = GLaM(CONFIG, seed=seed)
    optimizer = Adafactor(model.parameters(), min_factored=16)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    state = optimizer.named_state(model.named_parameters())
    assert {name.rpartition(".")[2] for name in state} == {"row_var", "col_var", "variance", "step"}
    assert state["layers.0.moe.wi.row_var"].shape == (4, 16)
    assert state["layers.0.moe.wi.col_var"].shape == (4, 24)
    return tensors, state


def _bounds(extent: int, index: int, parts: int) -> slice:
    return slice(*(sum((extent + parts - 1 - i) // parts for i in range(n)) for n in (index, index + 1)))


def part_of(layout: Layout, rank: int) -> PartOf:
    """Of any tensor: the slices that this rank holds."""
    experts, tensors, _ = layout
    expert_rank, tensor_rank = rank % experts, rank // experts % tensors
    # The dimension that is the hidden one.
    hidden_dims = {"wi": 2, "wi.col_var": 1, "wo": 1, "wo.row_var": 1}

    def part(name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        match = re.search(r"\.moe\.(w[io].*)", name)
        if not match:
            return None
        slices = [_bounds(shape[0], expert_rank, experts)]
        hidden_dim = hidden_dims.get(match[1])
        if hidden_dim is not None:
            slices += [slice(None)] * (hidden_dim - 1) + [_bounds(shape[hidden_dim], tensor_rank, tensors)]
        return tuple(slices)

    return part


def cut(tensor: Tensor, slices: tuple[slice, ...] | None) -> Tensor | Piece:
    if not slices:
        return tensor
    offset = [part.start or 0 for part in slices] + [0] * (tensor.dim() - len(slices))
    return Piece(tensor[slices], tuple(tensor.shape), tuple(offset))


def held_by(layout: Layout, rank: int, state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    part = part_of(layout, rank)
    model, optimizer = (
        {name: cut(tensor, part(name, tuple(tensor.shape))) for name, tensor in tensors.items()} for tensors in state
    )
    return model, optimizer


def save_layout(root: Path, step: int, layout: Layout, state: State, keep: int = 0) -> Path:
    """Saved by all ranks of the layout."""

    def save(ranks: Ranks) -> Path:
        model, optimizer = held_by(layout, ranks.rank, state)
        return save_checkpoint(root, step, CONFIG, model, optimizer, TRAINER, keep, ranks)

    folders = succeed(math.prod(layout), save)
    assert len(set(folders)) == 1
    return folders[0]


def load_layout(path: Path, layout: Layout) -> list[State]:
    """What each rank of the layout loads."""

    def load(ranks: Ranks) -> State:
        checkpoint = load_checkpoint(path, part=part_of(layout, ranks.rank), ranks=ranks)
        assert checkpoint.config == CONFIG
        assert checkpoint.trainer == {"step": checkpoint.step, **TRAINER}
        return checkpoint.model, checkpoint.optimizer

    return succeed(math.prod(layout), load)


def local(tensor: Tensor | Piece) -> Tensor:
    return tensor.tensor if isinstance(tensor, Piece) else tensor


def assert_same_state(got: State, expected: tuple[Mapping[str, Any], Mapping[str, Any]]) -> None:
    """Bit for bit, name by name."""
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            tensor = local(value)
            assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(mine[name], tensor), name
