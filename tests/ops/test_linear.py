"""Linear: y = x W with W [in, out]."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestLinear(levels.OpTests):
    op = samples.LINEAR


class TestLinearWide(levels.OpTests):
    """The same product, kept in float32 for bfloat16 activations."""

    op = samples.LINEAR_WIDE


def test_wide_is_not_rounded() -> None:
    x, weight = samples.LINEAR.find("small", torch.bfloat16, "T=6 D=5 F=7").args
    wide, narrow = torch.ops.glam.linear_wide(x, weight), torch.ops.glam.linear(x, weight)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.bfloat16(), narrow)
    assert not torch.equal(wide, narrow.float())


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]], requires_grad=True)
    y = torch.ops.glam.linear(x, weight)
    assert y.tolist() == [[5, 50, 500]]
    y.backward(torch.tensor([[1.0, 1.0, 0.0]]))
    assert x.grad is not None
    assert x.grad.tolist() == [[11, 22]]
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1, 0], [2, 2, 0]]


def test_autocast_gives_bfloat16_activations_and_float32_weight_gradients() -> None:
    sample = samples.LINEAR.find("small", torch.float32, "T=6 D=5 F=7")
    x, weight = levels.require_grad(sample)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.ops.glam.linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.ops.glam.linear(x.bfloat16(), weight))
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


BASE = samples.LINEAR.find("small", torch.float32, "T=6 D=5 F=7")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(6, 5, dtype=torch.int64)}, "x"),
        ({0: torch.tensor(1.0)}, "x"),
        ({0: torch.zeros(6, 4)}, "weight"),
        ({1: torch.zeros(5)}, "weight"),
        ({1: torch.zeros(5, 7, dtype=torch.float64)}, "weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.LINEAR, BASE, changes, text)
