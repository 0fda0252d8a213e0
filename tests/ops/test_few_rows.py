"""Products of few rows read their weights where they lie; rows among many pack them. Both give the same bits."""

from __future__ import annotations

import pytest
import torch

linear = torch.ops.glam.linear_wide


@pytest.mark.parametrize("layout", ["[K, N]", "[N, K]", "slices"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=lambda dtype: str(dtype)[6:],
)
def test_batch_invariance_of_few_rows(dtype: torch.dtype, weight_dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for depth in (1, 2, 7, 8, 16, 31, 33, 300, 1031, 4500):
        for columns in (1, 7, 16, 37, 129):
            x = torch.randn(40, depth, generator=generator, dtype=torch.float64).to(dtype)
            weight = torch.randn(depth + 1, columns + 3, generator=generator, dtype=torch.float64).to(weight_dtype)
            part = weight[1:, 3:]  # of odd addresses
            if layout == "[K, N]":
                part = part.contiguous()
            elif layout == "[N, K]":
                part = part.t().contiguous().t()
            many = linear(x, part)
            for rows in (1, 2, 3, 4, 5, 8, 9):
                assert torch.equal(linear(x[:rows], part), many[:rows]), (depth, columns, rows)
            exact = x.double() @ part.to(dtype).double()
            torch.testing.assert_close(linear(x[:3], part).double(), exact[:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "gelu", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_batch_invariance_of_experts_with_few_rows(dtype: torch.dtype, activation: str) -> None:
    """The same row in an expert of one row and in one of many."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 19, generator=generator).to(dtype)
    wi, wo, wg = (torch.randn(2, *shape, generator=generator).to(dtype) for shape in ((19, 45), (45, 19), (19, 45)))
    gate = wg if activation == "geglu" else None
    weights = [w[:1] for w in (wi, wo)] + [None if gate is None else gate[:1]]

    def run(count: int) -> torch.Tensor:
        offsets = torch.tensor([0, count], dtype=torch.int32)
        return torch.ops.glam.expert_mlp(rows[:count], offsets, *weights, activation)

    many = run(30)
    for count in (1, 2, 5, 8, 9):
        assert torch.equal(run(count), many[:count])
