"""Experts behind an exchange, in one process, where they equal expert_mlp. Many processes are in tests/distributed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from . import levels, samples


class TestExchangeMlp(levels.OpTests):
    op = samples.EXCHANGE_MLP


BASE = samples.EXCHANGE_MLP.find("small", torch.float32, "four experts geglu chunks=2")


def test_chunks_give_the_bits_of_one() -> None:
    """Of the output and of every gradient, for two chunks and for one."""
    rows, offsets, _, _, *weights, activation, group, _ = BASE.args

    def bits(call: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (rows, *weights)]
        y = call(*leaves)
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in leaves)]

    def chunked(rows: Tensor, *weights: Tensor, chunks: int, splits: list[int]) -> Tensor:
        return torch.ops.glam.exchange_mlp(rows, offsets, splits, splits, *weights, activation, group, chunks)

    expected = bits(lambda rows, *weights: torch.ops.glam.expert_mlp(rows, offsets, *weights, activation))
    for chunks, splits in ((1, [9]), (2, [3, 6]), (4, [3, 0, 5, 1])):
        for actual, wanted in zip(bits(partial(chunked, chunks=chunks, splits=splits)), expected, strict=True):
            assert torch.equal(actual, wanted)


class _Done(dist.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True


class _Alone(dist.ProcessGroup):
    """A group of one rank that goes through the transfers of many, each a range in a profile."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        torch._C._distributed_c10d._register_process_group("alone", self)

    def all_to_all_single(self, out: Tensor, rows: Tensor, *_: Any) -> dist.Work:
        with torch.profiler.record_function("transfer"):
            out.copy_(rows)
        return _Done()

    alltoall_base = all_to_all_single  # its name before torch 2.13


def test_rows_travel_before_the_weights_gradients_are_computed() -> None:
    rows, offsets, out_splits, in_splits, *weights, activation, _, chunks = BASE.args
    leaves = [weight.clone().requires_grad_() for weight in weights]
    group = _Alone()
    y = torch.ops.glam.exchange_mlp(rows, offsets, out_splits, in_splits, *leaves, activation, "alone", chunks)
    assert torch.equal(y, torch.ops.glam.exchange_mlp(*BASE.args))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.sum().backward()
    del group
    steps = ("transfer", "glam::_expert_mlp_backward_rows", "glam::_expert_mlp_backward_weights")
    events = sorted((e for e in profile.events() if e.name in steps), key=lambda e: e.time_range.start)
    assert [event.name.rpartition("_")[2] for event in events] == [
        *("transfer", "transfer"),  # both chunks' ways in
        *("rows", "transfer", "weights"),
        *("rows", "transfer", "weights"),
    ]


def test_one_weight_alone_gets_its_gradient() -> None:
    """The others are frozen; the gradient is that of all together."""
    rows, offsets, out_splits, in_splits, *weights, activation, group, chunks = BASE.args
    leaves = [weight.clone().requires_grad_() for weight in weights]
    y = torch.ops.glam.exchange_mlp(rows, offsets, out_splits, in_splits, *leaves, activation, group, chunks)
    y.square().sum().backward()
    for index, leaf in enumerate(leaves):
        mixed = [weight.clone().requires_grad_(i == index) for i, weight in enumerate(weights)]
        y = torch.ops.glam.exchange_mlp(rows, offsets, out_splits, in_splits, *mixed, activation, group, chunks)
        y.square().sum().backward()
        assert mixed[index].grad is not None
        assert torch.equal(mixed[index].grad, leaf.grad)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(11)}, "rows"),
        ({1: torch.zeros(9, dtype=torch.int32)}, "offsets"),
        ({2: [9]}, "splits"),
        ({2: [9, 9, 9], 3: [9, 9, 9]}, "splits"),
        ({2: [-1, 9], 3: [-1, 9]}, "splits"),
        ({2: [3, 9], 3: [3, 9]}, "splits"),
        ({2: [3, 5]}, r"out_splits\[1\] to equal in_splits\[1\], the rows that this rank sends to itself, got 5 and 6"),
        ({2: [], 3: []}, "rows"),
        ({4: torch.zeros(4, 5, 4)}, "wo"),
        ({7: "swish"}, "activation"),
        ({9: 3}, "chunks"),
        ({9: 0}, "chunks"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.EXCHANGE_MLP, BASE, changes, text)


def test_offsets_that_do_not_begin_with_the_chunk_are_refused() -> None:
    args = list(BASE.args)
    args[1:4] = [torch.tensor([0, 3, 3, 7, 9], dtype=torch.int32), [4, 5], [4, 5]]
    with pytest.raises(RuntimeError, match=r"expected offsets to ascend from 0"):
        torch.ops.glam.exchange_mlp(*args)
