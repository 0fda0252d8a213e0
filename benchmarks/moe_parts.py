"""What the MoE layer's time and memory depend on: experts, skew, routing, row copies.

    python benchmarks/moe_parts.py [--threads 1 2]

T = 2048 tokens unless said otherwise, D = 768, F = 3072, bfloat16 activations, float32 weights, forward and backward
with fresh gradients. Everything compared takes turns.

growth    T = 4096: time with E experts less time with 8 experts, less what the additional weights' bytes (read once
          forward and once backward, packed copies written and read, gradients written) take at the copy rate
skew      1 of 64 experts gets half of all tokens, against balanced routing
routing   router, gating and plan with their backward, as a share of the layer
copies    dispatch + combine of 32,768 tokens, against clones of the same bytes; new tensors on both sides, for which
          ours take memory of earlier ones again and torch's what malloc gives
memory    peak of the process during forward and backward beyond what it held before, against what is documented: saved
          tensors, gradients, the packed panels, and the work tensors that live at the same time
"""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from common import PeakMemory, medians, parser, print_header
from moe_layer import D, F, T, glam_layer, step
from reference_rates import copy_rate
from torch import Tensor

import glam_ext


def weights(experts: int) -> list[Tensor]:
    router = torch.randn(D, experts).div_(D**0.5).requires_grad_()
    wi = torch.randn(experts, D, F).div_(D**0.5).requires_grad_()
    wo = torch.randn(experts, F, D).div_(F**0.5).requires_grad_()
    return [router, wi, wo]


def tokens(count: int) -> Tensor:
    return torch.randn(count, D, dtype=torch.bfloat16).requires_grad_()


def layer_call(x: Tensor, parameters: Sequence[Tensor]) -> Callable[[], None]:
    return functools.partial(step, (functools.partial(glam_layer, x, *parameters), [x, *parameters]))


def growth(repeats: int, copy: float) -> None:
    x = tokens(2 * T)
    few = layer_call(x, weights(8))
    for experts in (32, 128, 256):
        seconds = medians({"few": few, "many": layer_call(x, weights(experts))}, repeats)
        added_bytes = 2 * (experts - 8) * D * F * (3 * 4 + 4 * 2)
        beyond = seconds["many"] - seconds["few"] - added_bytes / copy
        print(
            f"growth   E 8 -> {experts:<4} {seconds['few'] * 1e3:.0f} -> {seconds['many'] * 1e3:.0f} ms, bytes at copy "
            f"rate {added_bytes / copy * 1e3:.0f} ms; the rest is {beyond / seconds['few']:+.2f} of E 8"
        )


def skewed_layer(x: Tensor, gates: Tensor, ids: Tensor, wi: Tensor, wo: Tensor) -> Tensor:
    """Given routing: every token is kept, in dropless order."""
    positions = torch.zeros_like(ids)
    return torch.ops.glam.moe_mlp(x, gates, *torch.ops.glam.routing_plan(ids, positions, 64), wi, wo, None, "relu")


def skew(repeats: int) -> None:
    _, wi, wo = weights(64)
    x, gates = tokens(T), torch.full((T, 2), 0.5, requires_grad=True)
    turn = torch.arange(T, dtype=torch.int32)
    balanced = torch.stack([turn % 64, (turn + 32) % 64], dim=1)
    # The first choice of every token: half of all rows.
    crowded = torch.stack([torch.zeros_like(turn), 1 + turn % 63], dim=1)
    calls = {
        name: functools.partial(step, (functools.partial(skewed_layer, x, gates, ids, wi, wo), [x, gates, wi, wo]))
        for name, ids in {"balanced": balanced, "skewed": crowded}.items()
    }
    seconds = medians(calls, repeats)
    print(f"skew     half of the rows to 1 of 64 experts: {seconds['skewed'] / seconds['balanced']:.2f} of balanced")


def routing(repeats: int) -> None:
    for experts in (8, 64):
        x, parameters = tokens(T), weights(experts)
        router = parameters[0]

        def route(x: Tensor = x, router: Tensor = router, experts: int = experts) -> None:
            logits = torch.ops.glam.router_logits(x, router)
            gates, ids, positions, _ = torch.ops.glam.top2_gating(logits, None, None, -1)
            torch.ops.glam.routing_plan(ids, positions, experts)
            gates.sum().backward()
            x.grad = router.grad = None

        seconds = medians({"layer": layer_call(x, parameters), "route": route}, repeats)
        print(f"routing  E {experts:<4} {seconds['route'] / seconds['layer']:.3f} of the layer")


def copies(repeats: int) -> None:
    """bfloat16 rows of 32,768 tokens with two choices: 96 MiB of rows."""
    glam = torch.ops.glam
    count, experts = 16 * T, 64
    x = torch.randn(count, D).bfloat16()
    logits = torch.randn(count, experts)
    gates, ids, positions, _ = glam.top2_gating(logits, None, None, -1)
    plan = glam.routing_plan(ids, positions, experts)
    rows = glam.dispatch(x, *plan)

    def ours() -> None:
        glam.combine(glam.dispatch(x, *plan), gates, *plan)

    def copied() -> None:
        rows.clone()
        rows.clone()

    seconds = medians({"ours": ours, "copied": copied}, repeats)
    # Dispatch reads and writes each row, combine reads it and writes half as many; the copies read and write all twice.
    moved_ours, moved_copied = 3 * rows.nbytes + x.nbytes, 4 * rows.nbytes
    ratio = seconds["ours"] / (seconds["copied"] * moved_ours / moved_copied)
    print(f"copies   dispatch + combine of {rows.nbytes >> 20} MiB: {ratio:.2f} of copies of the same bytes")


def memory(experts: int) -> None:
    """Of the first step of a process that has run only a small one."""
    small = [torch.randn(*size, requires_grad=True) for size in ((64, 64), (64, 4), (4, 64, 128), (4, 128, 64))]
    step((functools.partial(glam_layer, *small), small))
    x, parameters = tokens(T), weights(experts)
    call = layer_call(x, parameters)
    gc.collect()
    with PeakMemory() as memory:
        call()
    rows = 2 * T
    saved = rows * F * 2  # the pre-activation; x and the plan were there or are small
    gradients = sum(parameter.nbytes for parameter in parameters) + x.nbytes
    work = rows * F * 2 + rows * D * 4  # the hidden gradient; rows of the result or of its gradient
    work += 2 * x.nbytes  # y and its gradient
    multiplies_bf16 = glam_ext.build_info()["backends"]["cpu"]["isa_active"] in ("avx512bf16", "amx")
    packs = 3 * F * D * (2 if multiplies_bf16 else 4)
    expected = saved + gradients + work + packs
    peak = memory.peak - memory.before
    print(
        f"memory   E {experts:<4} {peak / 1e6:.0f} MB at the peak, {peak / expected:.2f} of what is documented, "
        f"{expected / 1e6:.0f}"
    )


def main() -> None:
    known = parser(__doc__ or "")
    known.add_argument("--memory", type=int, metavar="E", help="only this, in this process")
    arguments = known.parse_args()
    if arguments.memory:
        memory(arguments.memory)
        return
    print_header()
    for experts in (8, 64):
        subprocess.run([sys.executable, __file__, "--memory", str(experts)], check=True)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        copy = copy_rate(arguments.repeats)
        print(f"\n{threads} threads: copy {copy / 1e9:.1f} GB/s")
        skew(arguments.repeats)
        routing(arguments.repeats)
        copies(arguments.repeats)
        growth(arguments.repeats, copy)


if __name__ == "__main__":
    main()
