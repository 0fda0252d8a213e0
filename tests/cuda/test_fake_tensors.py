"""CUDA tensors without a GPU: fake ones go through every op's checks and Meta kernels, with a CUDA build of torch
through its Autograd kernel too, and the results are on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.ops import samples
from tests.ops.samples import Op, Sample

HAS_CUDA = torch.version.cuda is not None  # without it autograd knows no such device
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
            torch.empty(arg.shape, dtype=arg.dtype, device="cuda").requires_grad_(HAS_CUDA and index in sample.grad)
            if isinstance(arg, Tensor)
            else arg
            for index, arg in enumerate(sample.args)
        ]
        result = op.raw(*args)
        outputs = [result] if isinstance(result, Tensor) else list(result or [])
        assert {output.device.type for output in outputs} <= {"cuda"}
        if HAS_CUDA and sample.grad:
            assert all(outputs[index].requires_grad for index in op.differentiable)
