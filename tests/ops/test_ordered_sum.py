"""The sum in the order of the elements, which no number of threads changes."""

from __future__ import annotations

import math

import pytest
import torch

from . import levels


def ordered_sum(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.glam.ordered_sum(x)


@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (100003,)])
def test_equals_the_exact_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    exact = torch.tensor(math.fsum(x.double().flatten().tolist()), dtype=torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(ordered_sum(x), exact.to(dtype), rtol=tolerance, atol=1e-10)
    if x.dim() == 2:
        assert torch.equal(ordered_sum(x.t()), ordered_sum(x.t().contiguous()))


def test_threads() -> None:
    x = torch.randn(200003)
    with levels.threads(1):
        expected = ordered_sum(x)
    for count in (2, 3, 7):
        with levels.threads(count):
            assert torch.equal(ordered_sum(x), expected)


def test_derivatives_and_tracing() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ordered_sum, x)
    assert torch.autograd.gradgradcheck(lambda x: ordered_sum(x * x), x)
    torch.library.opcheck(torch.ops.glam.ordered_sum.default, (x,))
    compiled = torch.compile(ordered_sum, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ordered_sum(x))
    script = torch.jit.CompilationUnit("def f(x):\n    return torch.ops.glam.ordered_sum(x)\n")
    assert torch.equal(script.f(x), ordered_sum(x))


def test_bad_input() -> None:
    with pytest.raises(RuntimeError, match=r"glam::ordered_sum: expected x to be"):
        ordered_sum(torch.zeros(3, dtype=torch.int64))
