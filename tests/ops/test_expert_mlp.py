"""Expert feed-forwards over segments of rows: segment s goes through expert s mod E_local."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestExpertMlp(levels.OpTests):
    op = samples.EXPERT_MLP


def test_by_hand() -> None:
    # Two experts that scale: 2 x 10 = 20 times and 3 x 100 = 300 times, after the ReLU. Four segments: 0, 1, 0, 1.
    wi, wo = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[10.0]], [[100.0]]])
    rows = torch.tensor([[1.0], [1.0], [-1.0], [2.0], [5.0]])
    offsets = torch.tensor([0, 1, 2, 2, 4], dtype=torch.int32)
    y = torch.ops.glam.expert_mlp(rows, offsets, wi, wo, None, "relu")
    # Rows: 20, 300, relu(-3) = 0, 600, and 0 after the last segment.
    assert y.tolist() == [[20], [300], [0], [600], [0]]


def test_relu_of_bfloat16_numbers() -> None:
    """Of each sign and exponent; a NaN stays one. Subnormal numbers may be zeros."""
    exponents = torch.arange(2 * 256).repeat_interleave(4) << 7
    bits = exponents | torch.tensor([0, 1, 64, 127]).repeat(2 * 256)
    x = bits.to(torch.int16).view(torch.bfloat16)[:, None]
    x = x[~x.isinf()][:, None]  # times the zeros below
    wi, wo = torch.ones(1, 1, 40), torch.zeros(1, 40, 1)
    wo[0, 17] = 1
    y = torch.ops.glam.expert_mlp(x, torch.tensor([0, len(x)], dtype=torch.int32), wi, wo, None, "relu")
    expected = torch.where(x < 0, 0.0, x.float())
    subnormal = expected.abs() < torch.finfo(torch.bfloat16).tiny
    assert torch.equal(
        torch.where(subnormal, 0, y.float()).nan_to_num(7.5), torch.where(subnormal, 0, expected).nan_to_num(7.5)
    )


def test_rows_of_an_expert_are_the_same_in_one_segment_or_two() -> None:
    """Rows that came from two ranks, ordered (rank, expert), give the bits of rows ordered by expert."""
    sample = samples.EXPERT_MLP.find("small", torch.float32, "six segments of three experts relu")
    rows, offsets, *weights = sample.args
    y = torch.ops.glam.expert_mlp(rows, offsets, *weights)
    sizes = offsets.diff().tolist()
    parts = list(torch.arange(int(offsets[-1])).split(sizes))
    order = torch.cat([part for e in range(3) for part in (parts[e], parts[e + 3])])
    joined = torch.tensor([0, *torch.tensor([sizes[e] + sizes[e + 3] for e in range(3)]).cumsum(0)]).int()
    assert torch.equal(torch.ops.glam.expert_mlp(rows[order], joined, *weights), y[order])


@pytest.mark.parametrize("name", ["three experts relu", "three experts geglu"])
def test_backward_in_two_parts(name: str) -> None:
    """Rows first, then the weights into slices of larger tensors, whose other parts stay: the bits of the whole."""
    glam = torch.ops.glam
    rows, offsets, wi, wo, wg, activation = samples.EXPERT_MLP.find("small", torch.float32, name).args
    _, pre, pre_gate = glam._expert_mlp_forward(rows, offsets, wi, wo, wg, activation)
    grad = rows.flip(0)
    whole = glam._expert_mlp_backward(grad, rows, offsets, pre, pre_gate, wi, wo, wg, activation)

    of_rows = (grad, offsets, pre, pre_gate, wi, wo, wg, activation)
    torch.library.opcheck(glam._expert_mlp_backward_rows.default, of_rows)
    grad_rows, grad_pre, grad_pre_gate = glam._expert_mlp_backward_rows(*of_rows)
    assert torch.equal(grad_rows, whole[0])

    around = [torch.full((size.shape[0] + 2, *size.shape[1:]), 7.0) if size.numel() else size for size in whole[1:]]
    slices = [tensor[1:-1] if tensor.numel() else tensor for tensor in around]
    of_weights = (grad, rows, offsets, pre, pre_gate, grad_pre, grad_pre_gate, activation, False, *slices)
    torch.library.opcheck(glam._expert_mlp_backward_weights.default, of_weights)
    versions = [tensor._version for tensor in around]
    glam._expert_mlp_backward_weights(*of_weights)
    for tensor, version, part, wanted in zip(around, versions, slices, whole[1:], strict=True):
        assert torch.equal(part, wanted)
        assert tensor._version == version + 1
        assert bool((tensor[[0, -1]] == 7.0).all() if tensor.numel() else wg is None)


BASE = samples.EXPERT_MLP.find("small", torch.float32, "three experts geglu")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(11)}, "rows"),
        ({0: torch.zeros(11, 6)}, "wi"),
        ({1: torch.zeros(4)}, "offsets"),
        ({1: torch.zeros(4, 1, dtype=torch.int32)}, "offsets"),
        ({1: torch.zeros(5, dtype=torch.int32)}, "offsets"),
        ({2: torch.zeros(3, 5, 4, dtype=torch.float64)}, "wi"),
        ({3: torch.zeros(3, 4, 5, dtype=torch.float64)}, "wo"),
        ({3: torch.zeros(3, 5, 5)}, "wo"),
        ({3: torch.zeros(2, 4, 5)}, "wo"),
        ({4: torch.zeros(3, 4, 5)}, "wg"),
        ({4: None}, "wg"),
        ({5: "relu"}, "wg"),
        ({5: "swish"}, "activation"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.EXPERT_MLP, BASE, changes, text)


def test_empty_offsets_are_refused_with_one_expert_too() -> None:
    weights = torch.zeros(1, 2, 3), torch.zeros(1, 3, 2)
    with pytest.raises(RuntimeError, match=r"glam::expert_mlp: expected offsets"):
        torch.ops.glam.expert_mlp(torch.zeros(4, 2), torch.zeros(0, dtype=torch.int32), *weights, None, "relu")
