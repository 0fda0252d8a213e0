"""The ops that talk to a process group, on two Gloo ranks: they give what one process gives."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tests.guards import COLLECTIVE_SECONDS

WORLD = 2
OFFSETS = [torch.tensor([0, 1, 1, 4, 6, 6, 9]).int(), torch.tensor([0, 2, 3, 3, 3, 3, 5]).int()]  # 2 ranks x 3 experts
COUNTS = [(offsets[1:] - offsets[:-1]).view(WORLD, 3) for offsets in OFFSETS]


def group() -> str:
    assert dist.group.WORLD is not None
    return dist.group.WORLD.group_name


def exchange_counts(rank: int) -> None:
    counts = torch.ops.glam.exchange_counts(OFFSETS[rank], group())
    assert torch.equal(counts[0], COUNTS[rank])
    assert torch.equal(counts[1], torch.stack([sent[rank] for sent in COUNTS]))


def exchange_uneven(rank: int) -> None:
    sent = COUNTS[rank].sum(1).tolist()
    received = [int(counts[rank].sum()) for counts in COUNTS]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        every = [(torch.arange(24).view(12, 2) + 100 * source).to(dtype) for source in range(WORLD)]
        rows = every[rank].clone().requires_grad_()
        y = torch.ops.glam.exchange(rows, received, sent, group())
        parts = []
        for source in range(WORLD):
            start = int(COUNTS[source][:rank].sum())
            parts.append(every[source][start : start + received[source]])
        assert torch.equal(y, torch.cat(parts))
        (y * (rank + 1)).sum().backward()
        expected = torch.zeros(12, 2, dtype=dtype)  # rows that were not sent get none
        expected[: sent[0]] = 1
        expected[sent[0] : sum(sent)] = 2
        assert rows.grad is not None
        assert torch.equal(rows.grad, expected)


def exchange_equal_and_empty(rank: int) -> None:
    rows = (torch.arange(8.0).view(4, 2) + 10 * rank).requires_grad_()
    y = torch.ops.glam.exchange(rows, [], [], group())
    mine = torch.arange(8.0).view(4, 2)[2 * rank : 2 * rank + 2]
    assert torch.equal(y, torch.cat([mine, mine + 10]))
    nothing = torch.ops.glam.exchange(rows, [0, 0], [0, 0], group())
    assert nothing.shape == (0, 2)
    (y.sum() + nothing.sum()).backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.ones(4, 2))
    with pytest.raises(RuntimeError, match=r"glam::exchange: expected"):
        torch.ops.glam.exchange(torch.zeros(5, 2), [], [], group())


def rows_sent_to_oneself(rank: int) -> None:
    """Splits that disagree about them are refused before anything travels, in whichever chunk they are."""
    rows = torch.zeros(8, 2)
    glam = torch.ops.glam
    text = rf"expected out_splits\[{rank}\] to equal in_splits\[{rank}\], the rows .* itself, got 1 and 2"
    with pytest.raises(RuntimeError, match=f"glam::exchange: {text}"):
        glam.exchange(rows, [1, 1], [2, 2], group())
    weights = (torch.zeros(2, 2, 3), torch.zeros(2, 3, 2), None)
    offsets = torch.tensor([0, 2, 4, 6, 7], dtype=torch.int32)
    text = rf"expected out_splits\[{2 + rank}\] to equal in_splits\[{2 + rank}\]"
    with pytest.raises(RuntimeError, match=f"glam::exchange_mlp: {text}"):
        glam.exchange_mlp(rows, offsets, [2, 2, 1, 1], [2, 2, 2, 2], *weights, "relu", group(), 2)


def expert_parallel_layer(rank: int) -> None:
    """Dispatch, exchange, experts, exchange, combine: outputs and gradients of the one-process layer."""
    glam = torch.ops.glam
    generator = torch.Generator().manual_seed(0)
    experts, dim, hidden, tokens = 4, 6, 10, 9
    x = [torch.randn(tokens, dim, generator=generator, dtype=torch.float64) for _ in range(WORLD)]
    router, wi, wo = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((dim, experts), (experts, dim, hidden), (experts, hidden, dim))
    )

    def plan(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        gates, ids, positions, _ = glam.top2_gating(x @ router, None, None, -1)
        return gates, glam.routing_plan(ids, positions, experts)

    whole = [tensor.clone().requires_grad_() for tensor in (wi, wo)]
    for source in range(WORLD):
        gates, routing = plan(x[source])
        glam.moe_mlp(x[source], gates, *routing, *whole, None, "relu").square().sum().backward()
    gates, routing = plan(x[rank])
    expected = glam.moe_mlp(x[rank], gates, *routing, wi, wo, None, "relu")

    mine = slice(rank * experts // WORLD, (rank + 1) * experts // WORLD)
    local = [tensor[mine].clone().requires_grad_() for tensor in (wi, wo)]
    row_of_choice, choice_of_row, offsets = routing
    counts = glam.exchange_counts(offsets, group())
    sent, received = counts.sum(2).tolist()
    rows = glam.exchange(glam.dispatch(x[rank], *routing), received, sent, group())
    segments = torch.cat([torch.zeros(1, dtype=torch.int32), counts[1].flatten().cumsum(0).int()])
    rows = glam.expert_mlp(rows, segments, *local, None, "relu")
    back = glam.exchange(rows, sent, received, group())
    back = torch.cat([back, back.new_zeros(choice_of_row.shape[0] - back.shape[0], dim)])
    y = glam.combine(back, gates, row_of_choice, choice_of_row, offsets)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    for part, full in zip(local, whole, strict=True):
        assert part.grad is not None
        assert full.grad is not None
        torch.testing.assert_close(part.grad, full.grad[mine], rtol=1e-12, atol=1e-12)


def split_vocabulary(rank: int) -> None:
    """The loss with half of the vocabulary on each rank: loss, nll, lse and both gradients of the whole."""
    generator = torch.Generator().manual_seed(0)
    hidden, table = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (7, 10))
    targets = torch.randint(0, 10, (7,), generator=generator)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    options = (0.7, 1e-2, 0.1, 3.0)
    h, e = hidden.clone().requires_grad_(), table.clone().requires_grad_()
    whole = torch.ops.glam.linear_cross_entropy(h, e, targets, weights, *options)
    whole[0].backward()
    half = slice(5 * rank, 5 * rank + 5)
    h2, e2 = hidden.clone().requires_grad_(), table[half].clone().requires_grad_()
    split = torch.ops.glam.linear_cross_entropy(h2, e2, targets, weights, *options, 5 * rank, group())
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    split[0].backward()
    assert h.grad is not None
    assert e.grad is not None
    torch.testing.assert_close(h2.grad, h.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(e2.grad, e.grad[half], rtol=1e-12, atol=1e-12)


def ordered_all_reduce(rank: int) -> None:
    """Numbers whose sum depends on its order: every rank adds rank 0's first, on a strided tensor too."""
    parts = [torch.tensor([[1e8, 1.0], [3.0, -1e-8]]) * (1 - 3 * source) for source in range(WORLD)]
    expected = parts[0] + parts[1]
    assert torch.equal(torch.ops.glam.ordered_all_reduce(parts[rank], group()), expected)
    assert torch.equal(torch.ops.glam.ordered_all_reduce(parts[rank].t(), group()), expected.t())


def gradient_reducer(rank: int) -> None:
    """Sums of both ranks after the last backward pass; before it nothing travels and gradients accumulate."""
    from glam_ext.distributed import GradientReducer

    shapes = [(40, 30), (7,), (5, 3), (2,)]
    for bucket_bytes in (64, 4096, 1 << 20):
        parameters = [torch.ones(shape, requires_grad=True) for shape in shapes]
        unused, alone = torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)
        names = [*((p, group()) for p in parameters), (unused, group()), (alone, "")]
        reducer = GradientReducer(names, bucket_bytes)
        for index in range(2):
            if index == 1:
                reducer.start()
            sum(((p * (rank + 1 + index)).sum() for p in [*parameters, alone]), torch.zeros(())).backward()
        reducer.finish()
        for parameter in parameters:  # (1 + 2) of rank 0, (2 + 3) of rank 1
            assert torch.equal(parameter.grad, torch.full_like(parameter, 8.0))
        assert torch.equal(unused.grad, torch.zeros(3))
        assert torch.equal(alone.grad, torch.full((4,), 3.0 + 2 * rank))
        with pytest.raises(RuntimeError, match="expected a start before the backward pass"):
            reducer.finish()
    with pytest.raises(RuntimeError, match="expected parameters to be leaves that require grad"):
        GradientReducer([(torch.ones(2, requires_grad=True) * 2, group())])


CHECKS: list[Callable[[int], None]] = [
    exchange_counts,
    exchange_uneven,
    exchange_equal_and_empty,
    rows_sent_to_oneself,
    expert_parallel_layer,
    split_vocabulary,
    ordered_all_reduce,
    gradient_reducer,
]


def _rank(rank: int, folder: str) -> None:
    import glam_ext  # noqa: F401

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    for check in CHECKS:
        check(rank)
        Path(folder, f"{check.__name__}.{rank}").touch()  # the verdict is written before anything is shut down
    dist.barrier()
    os._exit(0)  # the process group's own shutdown aborts now and then


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("two_ranks")
    error = ""
    try:
        mp.spawn(_rank, (str(folder),), nprocs=WORLD)
    except Exception as failure:
        error = str(failure)
    return folder, error


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_ranks(check: Callable[[int], None], verdicts: tuple[Path, str]) -> None:
    folder, error = verdicts
    assert all((folder / f"{check.__name__}.{rank}").exists() for rank in range(WORLD)), error
