"""CUDA tensors without a GPU: with a CUDA build of torch (make cuda-env) fake ones go through every op's checks,
Autograd and Meta kernels and through an exported block, and the results are on the device. With any torch, the same of
the CPU's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from glam_ext import GLaM, GLaMConfig, functional
from tests.ops import samples
from tests.ops.samples import Op, Sample

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA"))
HERE_ALONE = ("exchange", "exchange_mlp")  # a process group is not to be had in fake form
CASES = [
    pytest.param(op, sample, id=f"{op.name}-{str(dtype)[6:]}-{sample.name}")
    for op in samples.OPS
    if op.name not in HERE_ALONE
    for dtype in (torch.float32, torch.bfloat16)
    for sample in op.samples("small", dtype)[:2]
]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize(("op", "sample"), CASES)
def test_results_are_on_the_device(op: Op, sample: Sample, device: str) -> None:
    with FakeTensorMode():
        args = [
            torch.empty(arg.shape, dtype=arg.dtype, device=device).requires_grad_(index in sample.grad)
            if isinstance(arg, Tensor)
            else arg
            for index, arg in enumerate(sample.args)
        ]
        result = op.raw(*args)
        outputs = [result] if isinstance(result, Tensor) else list(result or [])
        assert {output.device.type for output in outputs} <= {device}
        if sample.grad:
            assert all(outputs[index].requires_grad for index in op.differentiable)


class Block(torch.nn.Module):
    """A layer of experts and a dense one, of tensors that never hold a number: attention, router, experts, GEGLU."""

    def __init__(self, config: GLaMConfig, device: str) -> None:
        super().__init__()
        shapes = {name: value.shape for name, value in GLaM(config, device="cpu").named_parameters()}
        self.names = list(shapes)
        with FakeTensorMode() as self.mode:
            self.values = torch.nn.ParameterList([torch.empty(shape, device=device) for shape in shapes.values()])
        self.options = functional.options_of(config)

    def forward(self, x_BSD: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parameters = dict(zip(self.names, self.values, strict=True))
        mask = segment_ids.flatten() != 0
        x = functional.attention_layer(x_BSD, segment_ids, "layers.0.", parameters, self.options)
        x, aux, _, statistics = functional.moe_layer(x, mask, 0, "layers.0.", parameters, self.options, True, [0, 0, 0])
        x = functional.attention_layer(x, segment_ids, "layers.1.", parameters, self.options)
        return functional.dense_layer(x, "layers.1.", parameters, self.options), aux, statistics


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_block_exports(dtype: torch.dtype, device: str) -> None:
    config = GLaMConfig.preset("tiny", num_layers=2, expert_activation="geglu", second_policy="random")
    block = Block(config, device)
    with block.mode:
        x = torch.empty(3, 16, config.model_dim, dtype=dtype, device=device)
        segment_ids = torch.empty(3, 16, dtype=torch.int32, device=device)
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(block, (x, segment_ids), dynamic_shapes=({0: rows}, {0: rows}))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    ops = {node.target.name() for node in calls if isinstance(node.target, torch._ops.OpOverload)}
    expected = "relative_attention router_logits top2_gating routing_plan moe_mlp router_statistics geglu_mlp rms_norm"
    assert {f"glam::{name}" for name in (*expected.split(), "linear")} <= ops
    values = [value for node in calls for value in torch.utils._pytree.tree_leaves(node.meta["val"])]
    assert {value.device.type for value in values if isinstance(value, Tensor)} == {device}
    output = next(iter(program.graph.output_node().args[0])).meta["val"]
    assert output.dtype == dtype
    assert output.shape[1:] == x.shape[1:]


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_every_kernel_of_the_cpu_has_one_of_cuda() -> None:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("glam::")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in names if has_kernel(name, "CPU") and not has_kernel(name, "CUDA")] == []
