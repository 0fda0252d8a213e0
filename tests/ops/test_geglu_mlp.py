"""The dense feed-forward gelu(x w0) * (x w1) wo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestGegluMlp(levels.OpTests):
    op = samples.GEGLU_MLP


def test_the_activated_branch_is_w0() -> None:
    # gelu_tanh(2) = 1 + tanh(sqrt(2/pi) (2 + 0.044715 * 8)) = 1 + tanh(1.8811...) = 1.954598; times 3, times 10.
    one = torch.ones(1, 1, dtype=torch.float64)
    y = torch.ops.glam.geglu_mlp(one, 2 * one, 3 * one, 10 * one)
    assert abs(y.item() - 58.6379) < 1e-3
    # With the branches exchanged it would be gelu(3) * 2 * 10 = 59.93.
    assert abs(torch.ops.glam.geglu_mlp(one, 3 * one, 2 * one, 10 * one).item() - 59.927) < 1e-2


BASE = samples.GEGLU_MLP.find("small", torch.float32, "T=6 D=5 F=7")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(6, 5, dtype=torch.int64)}, "x"),
        ({0: torch.zeros(6, 4)}, "w0"),
        ({1: torch.zeros(5)}, "w0"),
        ({2: torch.zeros(5, 6)}, "w1"),
        ({3: torch.zeros(5, 7)}, "wo"),
        ({3: torch.zeros(7, 5, dtype=torch.float64)}, "wo"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.GEGLU_MLP, BASE, changes, text)


@pytest.mark.parametrize("trained", range(3))
def test_one_weight_alone_gets_its_gradient(trained: int) -> None:
    """The others are frozen; the gradient is that of all together."""
    x, *weights = samples.GEGLU_MLP.samples("small", torch.float32)[0].args
    leaves = [weight.clone().requires_grad_() for weight in weights]
    torch.ops.glam.geglu_mlp(x, *leaves).square().sum().backward()
    mixed = [weight.clone().requires_grad_(index == trained) for index, weight in enumerate(weights)]
    torch.ops.glam.geglu_mlp(x, *mixed).square().sum().backward()
    assert mixed[trained].grad is not None
    assert torch.equal(mixed[trained].grad, leaves[trained].grad)
