"""Products whose sizes lie just beside the tiles, blocks and chunks of the packing, for every way operands can lie.

Errors are relative to the root mean square of the exact result, which unit-scale inputs make comparable. In bfloat16
the largest may be at most twice that of torch's own product of the same operands; in float32, where a sum is one chain,
it stays within what K products and sums, rounded to 2^-24 each, add up to.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from . import levels

ROWS = [1, 2, 6, 7, 8, 13, 14, 15, 28, 29]
COLUMNS = [1, 15, 16, 17, 31, 32, 33, 65]
DEPTHS = [1, 2, 3, 31, 33, 255, 257, 513]
# Beyond a run of the packing (512 columns, 1552 steps), a slice of 1024 columns, a block of 16 tiles, what is packed of
# the depth at once (8 KiB of a row), for both ways in which an operand lies.
LARGE = [(3, 1100, 70), (230, 40, 1025), (17, 3200, 33), (40, 515, 515), (15, 17, 4500), (4500, 17, 15)]
SIZES = [*itertools.product(ROWS, COLUMNS, [3, 33]), *itertools.product([1, 15], [33], DEPTHS), *LARGE]


def error(actual: Tensor, exact: Tensor) -> float:
    scale = math.sqrt(exact.square().mean().item())
    return (actual.double() - exact).abs().max().item() / scale


def products(x: Tensor, w: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x w, grad w^T and x^T grad: every operand once with its rows as the reduction and once not."""
    return x @ w, grad @ w.t(), x.t() @ grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_the_tiles(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    worst_ours, worst_theirs = 0.0, 0.0
    for rows, columns, depth in SIZES:
        x, w, grad = (
            torch.randn(*size, generator=generator).to(dtype)
            for size in ((rows, depth), (depth, columns), (rows, columns))
        )
        exact = products(x.double(), w.double(), grad.double())
        theirs = products(x, w, grad)
        x.requires_grad_()
        w.requires_grad_()
        y = torch.ops.glam.linear(x, w)
        y.backward(grad)
        reductions = (depth, columns, rows)
        for found, wanted, plain, K in zip((y, x.grad, w.grad), exact, theirs, reductions, strict=True):
            ours = error(found.detach(), wanted)
            if dtype == torch.float32:
                assert ours <= 12 * 2**-24 * math.sqrt(K), (rows, columns, depth)
            worst_ours, worst_theirs = max(worst_ours, ours), max(worst_theirs, error(plain, wanted))
    if dtype == torch.bfloat16:
        assert worst_ours <= 2 * worst_theirs


@pytest.mark.parametrize("form", ["float32", "bfloat16", "packed bfloat16", "packed int8"])
@pytest.mark.parametrize("count", [1, 14, 40])
def test_few_rows_of_a_deep_product_have_the_bits_that_they_have_among_many(form: str, count: int) -> None:
    """One task packs and multiplies a weight for few rows, a part of the depth after the other; many rows share it."""
    D, F, experts = 608, 1120, 9
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(500, D, generator=generator) for _ in range(2))
    wi, wo = (torch.randn(1, *size, generator=generator).div_(30) for size in ((D, F), (F, D)))
    if form != "float32":
        x, grad = x.bfloat16(), grad.bfloat16()
    if form.startswith("packed"):
        dtype = torch.int8 if form.endswith("int8") else torch.bfloat16
        wi, wo = (torch.ops.glam.pack_weight(weight, dtype) for weight in (wi, wo))

    def run(rows: int, times: int) -> list[Tensor]:
        """The result, and the gradient if there is one, of the first rows, given to so many equal experts."""
        leaf = x[:rows].repeat(times, 1).requires_grad_(not form.startswith("packed"))
        offsets = torch.arange(0, times * rows + 1, rows, dtype=torch.int32)
        weights = (weight.expand(times, *weight.shape[1:]).contiguous() for weight in (wi, wo))
        y = torch.ops.glam.expert_mlp(leaf, offsets, *weights, None, "relu")
        if not leaf.requires_grad:
            return [y]
        return [y.detach(), *torch.autograd.grad(y, leaf, grad[:rows].repeat(times, 1))]

    for whole, few in zip(run(500, 1), run(count, experts), strict=True):
        levels.assert_same_bits(few.view(experts, count, D).unbind(), [whole[:count]] * experts, f"{count} rows")


def expert_layer(rows: Tensor, offsets: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
    parts = []
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        hidden = (rows[begin:end] @ wi[expert].to(rows.dtype)).relu()
        parts.append(hidden @ wo[expert].to(rows.dtype))
    return torch.cat(parts)


@pytest.mark.parametrize("ends", [[0, 13, 13, 28, 29, 86], [0, 4500, 4500, 4501, 4503, 4510]], ids=["few", "thousands"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_as_exact_as_the_plain_composition(dtype: torch.dtype, ends: list[int]) -> None:
    """Root mean square errors of the result and each gradient over several seeds; odd sizes, an expert without rows."""
    D, F, offsets = 67, 131, torch.tensor(ends, dtype=torch.int32)
    ours, theirs = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(ends[-1], D, generator=generator).to(dtype)
        wi = torch.randn(5, D, F, generator=generator).div_(D**0.5)
        wo = torch.randn(5, F, D, generator=generator).div_(F**0.5)
        grad = torch.randn(ends[-1], D, generator=generator).to(dtype)
        outcomes = []
        for layer, cast in (
            (lambda r, i, o: torch.ops.glam.expert_mlp(r, offsets, i, o, None, "relu"), torch.Tensor.clone),
            (lambda r, i, o: expert_layer(r, offsets, i, o), torch.Tensor.clone),
            (lambda r, i, o: expert_layer(r, offsets, i, o), torch.Tensor.double),
        ):
            leaves = [cast(tensor).requires_grad_() for tensor in (rows, wi, wo)]
            y = layer(*leaves)
            y.backward(grad.to(y.dtype))
            outcomes.append([y.detach(), *(leaf.grad for leaf in leaves)])
        for index, (found, plain, exact) in enumerate(zip(*outcomes, strict=True)):
            ours[index] += (found.double() - exact).square().mean() / exact.square().mean()
            theirs[index] += (plain.double() - exact).square().mean() / exact.square().mean()
    allowed = 2 * theirs.sqrt()
    if dtype == torch.float32 and ends[-1] > 1000:  # the weights' gradients are one chain, a library adds partial sums
        allowed[2:] = allowed[2:].clamp(min=2**-24 * math.sqrt(ends[-1]))
    assert (ours.sqrt() <= allowed).all(), (ours.sqrt(), theirs.sqrt())
