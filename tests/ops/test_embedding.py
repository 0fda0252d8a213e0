"""Embedding: the table's row of each id; the gradient adds what repeated ids bring."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestEmbedding(levels.OpTests):
    op = samples.EMBEDDING


def test_by_hand() -> None:
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    y = torch.ops.glam.embedding(torch.tensor([2, 0, 2]), table)
    assert y.tolist() == [[5, 6], [1, 2], [5, 6]]
    y.backward(torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 0.5]]))
    assert table.grad is not None
    assert table.grad.tolist() == [[10, 0], [0, 0], [101, 0.5]]


BASE = samples.EMBEDDING.find("small", torch.float32, "(2, 5) V=7 D=4")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(3)}, "ids"),
        ({0: torch.tensor([7])}, "ids"),
        ({0: torch.tensor([-1])}, "ids"),
        ({1: torch.zeros(7)}, "table"),
        ({1: torch.zeros(7, 4, dtype=torch.int64)}, "table"),
    ],
    ids=["float", "too large", "negative", "one dimension", "integers"],
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.EMBEDDING, BASE, changes, text)
