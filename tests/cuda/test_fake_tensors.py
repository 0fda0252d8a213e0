"""CUDA tensors without a GPU: with a CUDA build of torch (make cuda-env) fake ones go through every op's checks,
Autograd and Meta kernels, and the results are on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops import samples
from tests.ops.samples import Op, Sample

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")

HERE_ALONE = ("exchange", "exchange_mlp")  # a process group is not to be had in fake form
CASES = [
    pytest.param(op, sample, id=f"{op.name}-{str(dtype)[6:]}-{sample.name}")
    for op in samples.OPS
    if op.name not in HERE_ALONE
    for dtype in (torch.float32, torch.bfloat16)
    for sample in op.samples("small", dtype)[:2]
]


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_results_are_on_the_device(op: Op, sample: Sample) -> None:
    with FakeTensorMode():
        args = [
            torch.empty(arg.shape, dtype=arg.dtype, device="cuda").requires_grad_(index in sample.grad)
            if isinstance(arg, Tensor)
            else arg
            for index, arg in enumerate(sample.args)
        ]
        result = op.raw(*args)
        outputs = [result] if isinstance(result, Tensor) else list(result or [])
        assert {output.device.type for output in outputs} <= {"cuda"}
        if sample.grad:
            assert all(outputs[index].requires_grad for index in op.differentiable)
