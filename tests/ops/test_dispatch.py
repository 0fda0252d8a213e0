"""Dispatch: rows[r] = x[token of r], zeros in an empty row."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from . import levels, samples


class TestDispatch(levels.OpTests):
    op = samples.DISPATCH
    levels_without: ClassVar = {"test_batch_invariance": "a row is a copy"}


def test_by_hand() -> None:
    # Token 0 is in rows 1 and 0, token 2 in row 2; rows 3 to 5 are empty.
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    plan = (
        torch.tensor([[1, 0], [-1, -1], [2, -1]]).int(),
        torch.tensor([1, 0, 4, -1, -1, -1]).int(),
        torch.tensor([0, 1, 3]).int(),
    )
    rows = torch.ops.glam.dispatch(x, *plan)
    assert rows.tolist() == [[1, 2], [1, 2], [5, 6], [0, 0], [0, 0], [0, 0]]
    rows.backward(torch.tensor([[1.0, 10.0]] * 6))
    assert x.grad is not None
    assert x.grad.tolist() == [[2, 20], [0, 0], [1, 10]]


BASE = samples.DISPATCH.find("small", torch.float32, "tight")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(7)}, "x"),
        ({0: torch.zeros(6, 5)}, "row_of_choice"),
        ({1: torch.zeros(7, 2)}, "row_of_choice"),
        ({2: torch.zeros(14, dtype=torch.int64)}, "choice_of_row"),
        ({2: torch.zeros(7, 2, dtype=torch.int32)}, "choice_of_row"),
        ({3: torch.zeros(4)}, "offsets"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.DISPATCH, BASE, changes, text)
