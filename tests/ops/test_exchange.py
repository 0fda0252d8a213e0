"""Exchange in one process: what is sent comes back. Several processes are in tests/distributed."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from . import levels, samples


class TestExchange(levels.OpTests):
    op = samples.EXCHANGE
    levels_without: ClassVar = {"test_batch_invariance": "a row is a copy"}


def test_rows_that_are_not_sent_get_no_gradient() -> None:
    rows = torch.ones(4, 2, requires_grad=True)
    y = torch.ops.glam.exchange(rows, [3], [3], "")
    assert y.shape == (3, 2)
    y.sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1, 1], [1, 1], [1, 1], [0, 0]]


def test_counts_in_one_process() -> None:
    # [sent or received, rank, expert]: differences of the offsets, twice.
    counts = torch.ops.glam.exchange_counts(torch.tensor([0, 2, 2, 7], dtype=torch.int32), "")
    assert counts.dtype == torch.int32
    assert counts.tolist() == [[[2, 0, 5]], [[2, 0, 5]]]


BASE = samples.EXCHANGE.find("small", torch.float32, "R=6 D=5 [4]")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.tensor(1.0)}, "rows"),
        ({1: [3]}, r"out_splits\[0\] to equal in_splits\[0\], the rows that this rank sends to itself, got 3 and 4"),
        ({1: [4, 0], 2: [4, 0]}, "splits"),
        ({1: [7], 2: [7]}, "splits"),
        ({1: [-1], 2: [-1]}, "splits"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.EXCHANGE, BASE, changes, text)
