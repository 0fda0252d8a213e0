"""One MoE layer, forward and backward, against what a user of plain PyTorch writes.

    python benchmarks/moe_layer.py

The layer: router, top-2 gating, E ReLU experts, combine; T = 2048 tokens, D = 768, F = 3072, float32 weights with
fresh gradients. `loop` gathers the tokens of each expert and slices the weights, as most published modules do on a CPU;
`sort` orders the rows by expert and calls torch's grouped product. Times are medians of alternating runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from common import medians, parser, print_header
from torch import Tensor

T, D, F = 2048, 768, 3072


def top2(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, experts = logits.float().softmax(-1).topk(2, dim=-1)
    return values / values.sum(-1, keepdim=True), experts


def glam_layer(x: Tensor, router: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
    glam = torch.ops.glam
    gates, ids, positions, _ = glam.top2_gating(glam.linear(x.float(), router), None, None, -1)
    return glam.moe_mlp(x, gates, *glam.routing_plan(ids, positions, wi.shape[0]), wi, wo, None, "relu")


def loop_layer(x: Tensor, router: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
    gates, experts = top2(x.float() @ router)
    y = torch.zeros_like(x)
    for expert in range(wi.shape[0]):
        token, choice = (experts == expert).nonzero(as_tuple=True)
        rows = (x[token] @ wi[expert].to(x.dtype)).relu() @ wo[expert].to(x.dtype)
        y = y.index_add(0, token, rows * gates[token, choice, None].to(x.dtype))
    return y


def sort_layer(x: Tensor, router: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
    gates, experts = top2(x.float() @ router)
    order = experts.flatten().argsort(stable=True)
    ends = torch.bincount(experts.flatten(), minlength=wi.shape[0]).cumsum(0).int()
    hidden = torch.nn.functional.grouped_mm(x[order // 2], wi.to(x.dtype), offs=ends).relu()
    rows = torch.nn.functional.grouped_mm(hidden, wo.to(x.dtype), offs=ends)
    weighted = rows * gates.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // 2, weighted)


LAYERS: dict[str, Callable[..., Tensor]] = {"glam": glam_layer, "loop": loop_layer, "sort": sort_layer}


def run(layer: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Forward and backward; the gradients are dropped, so that the next run makes fresh ones."""
    layer(*tensors).float().sum().backward()
    for tensor in tensors:
        tensor.grad = None


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    print_header()
    print("dtype     E    threads  glam ms   loop / glam   sort / glam")
    for experts in (8, 64):
        router = torch.randn(D, experts).div_(D**0.5).requires_grad_()
        wi = torch.randn(experts, D, F).div_(D**0.5).requires_grad_()
        wo = torch.randn(experts, F, D).div_(F**0.5).requires_grad_()
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(T, D, dtype=dtype, requires_grad=True)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                # With 64 experts the loop's backward writes a full-size gradient per slice: minutes, so left out.
                names = ["glam", "loop", "sort"] if experts <= 8 else ["glam", "sort"]
                calls = {name: functools.partial(run, LAYERS[name], x, router, wi, wo) for name in names}
                seconds = medians(calls, arguments.repeats)
                ratio = {name: f"{value / seconds['glam']:.2f}" for name, value in seconds.items()}
                setting = f"{str(dtype)[6:]:9} {experts:<4} {threads:<8} {seconds['glam'] * 1e3:<9.1f}"
                print(setting, f"{ratio.get('loop', '-'):<13} {ratio['sort']}")


if __name__ == "__main__":
    main()
