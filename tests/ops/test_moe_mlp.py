"""The one-rank whole: dispatch, experts and combine in one op, equal to the three."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples
from .samples import Sample


class TestMoeMlp(levels.OpTests):
    op = samples.MOE_MLP


def three_ops(sample: Sample) -> list[torch.Tensor]:
    def call(x: Any, gates: Any, row_of_choice: Any, choice_of_row: Any, offsets: Any, *weights: Any) -> torch.Tensor:
        plan = (row_of_choice, choice_of_row, offsets)
        rows = torch.ops.glam.expert_mlp(torch.ops.glam.dispatch(x, *plan), offsets, *weights)
        return torch.ops.glam.combine(rows, gates, *plan)

    return levels.run_with_gradients(samples.MOE_MLP, sample, call)


@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
@pytest.mark.parametrize("size", ["small", "tiles", "edges"])
def test_equals_the_three_ops_forward_and_backward(dtype: torch.dtype, size: str) -> None:
    for sample in samples.MOE_MLP.samples(size, dtype):
        whole = levels.run_with_gradients(samples.MOE_MLP, sample)
        for index, (a, b) in enumerate(zip(whole, three_ops(sample), strict=True)):
            levels.assert_close(a, b, levels.GRADIENT_TOLERANCE[dtype], f"{sample.name}: result {index}")


def test_gate_gradient_is_zero_without_a_row_and_right_where_the_gate_is_zero() -> None:
    """The gate's gradient is <act(pre) wo, dy>: it does not need the gate itself."""
    sample = samples.MOE_MLP.find("tiles", torch.float64, "T=64 E=2 relu")
    x, gates, row_of_choice, *rest = sample.args
    dropped = row_of_choice < 0
    assert dropped[:, 0].any()
    assert dropped[:, 1].any()
    assert (~dropped).any()
    grads = []
    for value in (gates, torch.zeros_like(gates)):
        value = value.clone().requires_grad_()
        y = torch.ops.glam.moe_mlp(x, value, row_of_choice, *rest)
        grads.append(torch.autograd.grad(y, value, torch.ones_like(y))[0])
    assert torch.equal(grads[0], grads[1])
    assert (grads[0][dropped] == 0).all()
    assert (grads[0][~dropped] != 0).any()


BASE = samples.MOE_MLP.find("small", torch.float32, "tight geglu")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(7)}, "x"),
        ({0: torch.zeros(7, 6)}, "wi"),
        ({1: torch.zeros(7, 3)}, "gates"),
        ({2: torch.zeros(6, 2, dtype=torch.int32)}, "row_of_choice"),
        ({3: torch.zeros(14, dtype=torch.int64)}, "choice_of_row"),
        ({4: torch.zeros(3, dtype=torch.int64)}, "offsets"),
        ({5: torch.zeros(3, 5, 4, dtype=torch.float64)}, "wi"),
        ({5: torch.zeros(3, 6, 5, dtype=torch.float16)}, "wi"),
        ({6: torch.zeros(3, 5, 5)}, "wo"),
        ({4: torch.zeros(0, dtype=torch.int32)}, "offsets"),
        ({7: None}, "wg"),
        ({8: "swish"}, "activation"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.MOE_MLP, BASE, changes, text)
