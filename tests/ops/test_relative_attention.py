"""Attention with bucketed relative bias over whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.reference import attention

from . import levels, samples


class TestRelativeAttention(levels.OpTests):
    op = samples.RELATIVE_ATTENTION


def test_extra_logit_by_hand() -> None:
    # One position, logit ln 3: weight 3 / (3 + 1) with the extra logit 0, and 1 without.
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    bias = torch.zeros(1, 32, dtype=torch.float64)
    bias[0, 0] = torch.tensor(3.0).double().log()
    value = 8 * one
    zero = 0 * one
    assert abs(torch.ops.glam.relative_attention(zero, one, value, bias, None, True, 0.0).item() - 6.0) < 1e-12
    assert abs(torch.ops.glam.relative_attention(zero, one, value, bias, None, False, 0.0).item() - 8.0) < 1e-12


def test_every_distance_uses_its_bucket() -> None:
    """With q = 0 the weights are softmax(bias of the bucket); v = identity shows them: position 299 sees 0 to 299."""
    size = 300
    bias = torch.arange(32, dtype=torch.float64)[None] / 7
    v = torch.eye(size, dtype=torch.float64).reshape(1, size, 1, size)
    zero = torch.zeros_like(v)
    weights = torch.ops.glam.relative_attention(zero, zero, v, bias, None, False, 0.0)[0, -1, 0]
    expected = torch.tensor([attention.bucket(size - 1 - key) / 7 for key in range(size)], dtype=torch.float64)
    torch.testing.assert_close(weights, torch.softmax(expected, 0), rtol=1e-12, atol=0)


@levels.with_own_products
@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
def test_a_position_depends_on_what_came_before_it_alone(dtype: torch.dtype) -> None:
    """The bits of a prefix are the same whatever follows, in every size of prefix."""
    sample = samples.RELATIVE_ATTENTION.find("tiles", dtype, "(2, 65, 3, 17)")
    q, k, v, bias, _, extra, cap = sample.args
    whole = torch.ops.glam.relative_attention(q, k, v, bias, None, extra, cap)
    for stop in (1, 16, 17, 33, 64):
        part = torch.ops.glam.relative_attention(q[:, :stop], k[:, :stop], v[:, :stop], bias, None, extra, cap)
        assert torch.equal(part, whole[:, :stop]), stop


def test_very_large_logits_stay_finite() -> None:
    sample = samples.RELATIVE_ATTENTION.find("small", torch.float32, "packed")
    q, *rest = levels.require_grad(sample)
    y = torch.ops.glam.relative_attention(1e4 * q, *rest)
    assert y.isfinite().all()
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in rest[:3])


BASE = samples.RELATIVE_ATTENTION.find("small", torch.float32, "packed")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(2, 11, 6)}, "q"),
        ({0: torch.zeros(2, 11, 2, 3, dtype=torch.int32)}, "q"),
        ({1: torch.zeros(2, 10, 2, 3)}, "k"),
        ({1: torch.zeros(2, 11, 2, 3, dtype=torch.float64)}, "k"),
        ({2: torch.zeros(2, 11, 2, 4)}, "v"),
        ({3: torch.zeros(2, 31)}, "bias"),
        ({3: torch.zeros(3, 32)}, "bias"),
        ({4: torch.zeros(2, 10, dtype=torch.int32)}, "segment_ids"),
        ({4: torch.zeros(2, 11, dtype=torch.int64)}, "segment_ids"),
        ({6: -1.0}, "logit_cap"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.RELATIVE_ATTENTION, BASE, changes, text)


@pytest.mark.parametrize("dtype", [dtype for dtype in levels.DTYPES if dtype.itemsize == 2], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one segment", "packed"])
@pytest.mark.parametrize("seed", range(4))
def test_16_bits_are_as_close_as_the_plain_composition(seed: int, packed: bool, dtype: torch.dtype) -> None:
    """Root mean square errors of the output and of all gradients against float64, beside torch's ops in the dtype."""
    generator = torch.Generator().manual_seed(seed)
    size, heads, width = 150, 2, 32
    q, k, v, given = (
        torch.randn(2, size, heads, width, generator=generator).to(dtype) / width ** (0.25 if i < 2 else 0)
        for i in range(4)
    )
    bias = torch.randn(heads, 32, generator=generator)
    segments = (1 + torch.arange(size) // 64).expand(2, size).int().contiguous() if packed else None
    hidden = torch.ones(size, size, dtype=torch.bool).triu(1)
    if segments is not None:
        hidden = (hidden | (segments[:, :, None] != segments[:, None, :]))[:, None]
    bucket = torch.tensor([[attention.bucket(max(i - j, 0)) for j in range(size)] for i in range(size)])

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("bihd,bjhd->bhij", q, k).to(bias.dtype) + bias[:, bucket]
        logits = logits.masked_fill(hidden, float("-inf"))
        weights = torch.softmax(torch.cat([logits, torch.zeros_like(logits[..., :1])], -1), -1)[..., :-1]
        return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v)

    def ours(*args: torch.Tensor) -> torch.Tensor:
        return torch.ops.glam.relative_attention(*args, segments, True, 0.0)

    def results(function: Any, *args: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in args]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, given.to(out.dtype))]

    exact = results(plain, *(x.double() for x in (q, k, v, bias)))
    mine, theirs = results(ours, q, k, v, bias), results(plain, q, k, v, bias)
    for name, wanted, a, b in zip(("out", "q", "k", "v", "bias"), exact, mine, theirs, strict=True):
        error, usual = ((x.double() - wanted).square().mean().sqrt() for x in (a, b))
        assert error <= 2 * usual, f"{name}: {error:.2e}, plain {usual:.2e}"
