"""One MoE layer, forward and backward, against what this machine could do and against what others' users run.

    python benchmarks/moe_layer.py [--pages huge]

The layer: router, top-2 gating, plan, E ReLU experts, combine; T = 2048 tokens, D = 768, F = 3072, activations in
bfloat16 or float32, float32 weights, balanced random routing. Everything that a step makes is made: gradients are
fresh, or (the lines "added") added to those that are there, by autograd and under `accumulate_in_place`.

bound   FLOPs / dense + mandatory bytes / copy (benchmarks/reference_rates.py): float32 weights read once forward and
        once backward, their packed copies written and read, gradients written once
sort    rows sorted by expert and torch's grouped product, what most write today; weights cast in each step
mixtral Transformers' Mixtral block under autocast, if it is installed, with its experts as a loop or as grouped
        products; F = 2048, as its experts have three matrices: the same FLOPs
fairscale  its MOELayer with Top2Gate under autocast, if it is installed: one-hot dispatch by einsum, with a capacity
        of 2 T / E, so tokens that we keep are dropped
loop    rows of each expert gathered, weights sliced (E = 8 only: with 64 its backward takes minutes)

Peers start from the same float32 weights and produce float32 gradients. Ratios are of their medians to ours; all take
turns. `--pages huge` runs everything with transparent huge pages for torch's own memory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable

import torch
from common import medians, parser, print_header
from reference_rates import copy_rate, dense_rate
from torch import Tensor, nn

from glam_ext.ops import accumulate_in_place

T, D, F = 2048, 768, 3072


def top2(logits: Tensor) -> tuple[Tensor, Tensor]:
    values, experts = logits.float().softmax(-1).topk(2, dim=-1)
    return values / values.sum(-1, keepdim=True), experts


def glam_layer(x: Tensor, router: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
    glam = torch.ops.glam
    gates, ids, positions, _ = glam.top2_gating(glam.router_logits(x, router), None, None, -1)
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


def mixtral(experts: int, implementation: str) -> nn.Module | None:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        return None
    config = MixtralConfig(
        hidden_size=D, intermediate_size=F * 2 // 3, num_local_experts=experts, num_experts_per_tok=2
    )
    config._experts_implementation = implementation
    block: nn.Module = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    return block


def fairscale(experts: int) -> nn.Module | None:
    try:
        import torch.distributed as dist
        from fairscale.nn.moe import MOELayer, Top2Gate
    except ImportError:
        return None
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    networks = (
        nn.Sequential(nn.Linear(D, F, bias=False), nn.ReLU(), nn.Linear(F, D, bias=False)) for _ in range(experts)
    )
    layer: nn.Module = MOELayer(Top2Gate(D, experts), nn.ModuleList(networks))
    return layer


Layer = tuple[Callable[[], Tensor], list[Tensor]]


def layers(experts: int, dtype: torch.dtype) -> dict[str, Layer]:
    """By name: the forward pass, and the tensors that get gradients."""
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    router = torch.randn(D, experts).div_(D**0.5).requires_grad_()
    wi = torch.randn(experts, D, F).div_(D**0.5).requires_grad_()
    wo = torch.randn(experts, F, D).div_(F**0.5).requires_grad_()
    inputs = [x, router, wi, wo]
    found: dict[str, Layer] = {
        "glam": (functools.partial(glam_layer, *inputs), inputs),
        "sort": (functools.partial(sort_layer, *inputs), inputs),
    }
    names = (
        {"eager": "mixtral loop", "grouped_mm": "mixtral grouped"}
        if experts <= 8
        else {"grouped_mm": "mixtral grouped"}
    )
    modules = {name: mixtral(experts, implementation) for implementation, name in names.items()}
    for name, module in {**modules, "fairscale": fairscale(experts)}.items():
        if module is None:
            continue

        def run(module: nn.Module = module) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return module(x.view(experts, T // experts, D))  # fairscale divides the first size by the experts

        found[name] = (run, [x, *module.parameters()])
    if experts <= 8:
        found["loop"] = (functools.partial(loop_layer, *inputs), inputs)
    return found


def step(layer: Layer, gradients: str = "fresh") -> None:
    assert gradients in ("fresh", "added", "added in place"), gradients
    forward, inputs = layer
    y = forward()
    with accumulate_in_place() if gradients == "added in place" else contextlib.nullcontext():
        y.backward(torch.ones_like(y))
    if gradients == "fresh":
        for tensor in inputs:
            tensor.grad = None


def bound(experts: int, dtype: torch.dtype, dense: float, copy: float) -> float:
    weights = 2 * experts * D * F * 4
    packed = 2 * weights if dtype == torch.float32 else weights
    flops = 3 * 2 * (2 * 2 * T * D * F)
    return flops / dense + (2 * weights + 2 * packed + weights) / copy


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--pages", choices=("default", "huge"), default="default")
    arguments.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    chosen = arguments.parse_args()
    if chosen.pages == "huge" and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"})
    print_header()
    for threads in chosen.threads:
        torch.set_num_threads(threads)
        copy = copy_rate(chosen.repeats)
        print(f"\n{threads} threads: copy {copy / 1e9:.1f} GB/s")
        for dtype in (torch.bfloat16, torch.float32):
            dense, whose = dense_rate(dtype, T, D, F, chosen.repeats)
            print(f"{str(dtype)[6:]}: dense {dense / 1e9:.0f} GFLOP/s ({whose})")
            for experts in chosen.experts:
                everything = layers(experts, dtype)
                fresh = medians({n: functools.partial(step, layer) for n, layer in everything.items()}, chosen.repeats)
                limit, ours = bound(experts, dtype, dense, copy), fresh["glam"]
                peers = "  ".join(f"{name} {value / ours:.2f}" for name, value in fresh.items() if name != "glam")
                print(f"  E {experts:<4} {ours * 1e3:8.1f} ms, {ours / limit:.2f} of the bound; {peers}")
                ways = ("added", "added in place")
                added = medians({w: functools.partial(step, everything["glam"], w) for w in ways}, chosen.repeats)
                print("        ", "  ".join(f"{way} {value / ours:.2f} of fresh" for way, value in added.items()))
                del everything


if __name__ == "__main__":
    main()
