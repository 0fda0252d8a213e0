"""The sum over ranks in rank order, in one process, where it is a copy. Two ranks are in tests/distributed."""

from __future__ import annotations

import pytest
import torch

op = torch.ops.glam.ordered_all_reduce


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_alone_it_is_a_copy(dtype: torch.dtype) -> None:
    for x in (torch.randn(3, 5).to(dtype), torch.randn(4, 3).to(dtype).t(), torch.zeros(0, dtype=dtype)):
        y = op(x, "")
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr() or x.numel() == 0


def test_opcheck() -> None:
    torch.library.opcheck(op, (torch.randn(3, 5), ""))


def test_it_is_not_differentiable() -> None:
    assert not op(torch.randn(3, requires_grad=True), "").requires_grad


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"glam::ordered_all_reduce: expected x to be Double, Float or BFloat16"):
        op(torch.zeros(3, dtype=torch.long), "")
