"""Combine: y[t] = sum over the choices with a row of gate * row."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestCombine(levels.OpTests):
    op = samples.COMBINE


def test_by_hand() -> None:
    # Token 0 has rows 1 (gate 0.5) and 0 (gate 2); token 1 lost both; token 2 has row 2 (gate 3).
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0], [4.0, 5.0], [9.0, 9.0]], requires_grad=True)
    gates = torch.tensor([[0.5, 2.0], [0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    plan = (
        torch.tensor([[1, 0], [-1, -1], [2, -1]]).int(),
        torch.tensor([1, 0, 4, -1]).int(),
        torch.tensor([0, 1, 3]).int(),
    )
    y = torch.ops.glam.combine(rows, gates, *plan)
    assert y.tolist() == [[7, 14], [0, 0], [12, 15]]
    y.backward(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]))
    assert rows.grad is not None
    assert rows.grad.tolist() == [[2, 0], [0.5, 0], [3, 6], [0, 0]]
    # <row, dy>: rows 1 and 0 against (1, 0), row 2 against (1, 2); no gradient where there is no row.
    assert gates.grad is not None
    assert gates.grad.tolist() == [[10, 1], [0, 0], [14, 0]]


BASE = samples.COMBINE.find("small", torch.float32, "tight")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(14)}, "rows"),
        ({0: torch.zeros(13, 5)}, "choice_of_row|rows"),
        ({1: torch.zeros(7, 3)}, "gates|row_of_choice"),
        ({1: torch.zeros(7, 2, dtype=torch.bfloat16)}, "gates"),
        ({2: torch.zeros(7, 2)}, "row_of_choice"),
        ({3: torch.zeros(14, dtype=torch.int64)}, "choice_of_row"),
        ({4: torch.zeros(4)}, "offsets"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.COMBINE, BASE, changes, text)
