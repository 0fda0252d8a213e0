"""The router's logits: linear in float32, whatever the dtype of x."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestRouterLogits(levels.OpTests):
    """The same product with the weight as it is, in float32."""

    op = samples.ROUTER_LOGITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("experts", [1, 2, 8, 16, 17, 64, 130])
def test_router_logits_have_the_bits_of_linear_in_float32(experts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 31, 520).to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    weight, grad = torch.randn(520, experts, dtype=wide), torch.randn(5, 31, experts, dtype=wide)
    leaves = [[tensor.clone().requires_grad_() for tensor in (x, weight)] for _ in range(2)]
    logits = torch.ops.glam.router_logits(*leaves[0])
    expected = torch.ops.glam.linear(leaves[1][0].to(wide), leaves[1][1])
    for y in (logits, expected):
        y.backward(grad)
    assert logits.dtype == wide
    levels.assert_same_bits([logits], [expected], "logits")
    levels.assert_same_bits([t.grad for t in leaves[0]], [t.grad for t in leaves[1]], "gradients")


def test_autocast_leaves_router_logits_in_float32() -> None:
    x, weight = torch.randn(20, 16), torch.randn(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = torch.ops.glam.router_logits(x, weight)
    assert torch.equal(logits, torch.ops.glam.linear(x, weight))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(6, 5, dtype=torch.int64)}, "x"),
        ({0: torch.tensor(1.0)}, "x"),
        ({0: torch.zeros(6, 4)}, "weight"),
        ({1: torch.zeros(5)}, "weight"),
        ({1: torch.zeros(5, 7, dtype=torch.float64)}, "weight"),
        ({1: torch.ops.glam.pack_weight(torch.zeros(6, 32), torch.bfloat16)}, "weight"),
    ],
    ids=["x of integers", "scalar x", "width of x", "1-D weight", "weight in float64", "packed weight"],
)
def test_bad_input_of_router_logits(changes: dict[int, Any], text: str) -> None:
    base = samples.ROUTER_LOGITS.find("small", torch.float32, "T=6 D=5 F=7")
    levels.assert_refused(samples.ROUTER_LOGITS, base, changes, text)
