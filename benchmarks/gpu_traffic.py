"""The memory traffic of the CUDA kernels, counted by the emulator: no GPU is needed.

    python benchmarks/gpu_traffic.py build/cuda-emulated/libglam_cuda_emulated.so [--markdown | --write]

Per op: the bytes it must move, the bytes of the 32-byte sectors that its warps touch in global memory over them, the
share of those sectors that the same bytes would not need (uncoalesced access), and the passes over shared memory's
banks over those needed. The bytes it must move are each input read once and each output written once; of an op that
has products by the library in it, what its own kernels get from them and give to them. What a cache would serve counts
as touched, so the ratio is an upper bound of the traffic to memory. The last columns are the time that the touched
bytes take at the memory rates of the datasheets: 2.04 TB/s for an A100 with 80 GB, 3.35 TB/s for an H100 SXM.

Kernels of the ops below are counted, as they run for bfloat16 activations and float32 weights; not what runs inside the
library: its products, sorts and attention. --write puts the table into docs/cuda.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from generated import replace_part, table
from torch import Tensor

import glam_ext  # noqa: F401  (registers torch.ops.glam)

GLAM = torch.ops.glam
SECTOR = 32
RATES = {"A100": 2.04e12, "H100": 3.35e12}


@dataclass(frozen=True)
class Sizes:
    """T tokens of D, E experts of F; a vocabulary of V and B sequences of S; a matrix [2, D, matrix] of weights."""

    T: int = 1024
    D: int = 256
    E: int = 16
    F: int = 64
    V: int = 384
    B: int = 1  # as the emulated build takes a sequence at a time
    S: int = 64
    H: int = 4
    A: int = 64
    matrix: int = 512


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# An op -> a call of it and the bytes that it must move.
Cases = dict[str, tuple[Callable[[], object], int]]


def routing_cases(s: Sizes) -> Cases:
    logits = torch.randn(s.T, s.E)
    gates, ids, positions, aux = GLAM.top2_gating(logits, None, None, s.T // 4)
    grads = torch.randn_like(gates), torch.randn_like(aux)
    plan = GLAM.routing_plan(ids, positions, s.E)
    slots = max(1, s.T // s.E)
    slotted = GLAM.routing_plan(ids, positions, s.E, s.T // 4, slots)
    x = torch.randn(s.T, s.D).bfloat16()
    rows = GLAM.dispatch(x, *plan)
    wi, wo = torch.randn(s.E, s.D, s.F), torch.randn(s.E, s.F, s.D)
    experts = (wi, wo, None, "gelu")
    y, pre, pre_gate = GLAM._moe_mlp_forward(x, gates, *plan, *experts)
    return {
        "top2_gating": (
            lambda: GLAM.top2_gating(logits, None, None, s.T // 4),
            nbytes(logits, gates, ids, positions, aux),
        ),
        "top2_gating backward": (
            lambda: GLAM._top2_gating_backward(*grads, logits, ids, positions, s.T // 4, True),
            nbytes(logits, logits, gates, ids, positions),
        ),
        "routing_plan": (lambda: GLAM.routing_plan(ids, positions, s.E), nbytes(ids, positions, *plan)),
        "routing_plan, slots": (
            lambda: GLAM.routing_plan(ids, positions, s.E, s.T // 4, slots),
            nbytes(ids, positions, *slotted),
        ),
        "router_statistics": (lambda: GLAM.router_statistics(ids, positions, s.E), nbytes(ids, positions)),
        "dispatch": (lambda: GLAM.dispatch(x, *plan), nbytes(rows, rows, plan[1])),
        "dispatch backward": (lambda: GLAM._dispatch_backward(rows, *plan), nbytes(rows, x, plan[0])),
        "combine": (lambda: GLAM.combine(rows, gates, *plan), nbytes(rows, x, plan[0], gates)),
        "combine backward": (
            lambda: GLAM._combine_backward(x, rows, gates, *plan),
            nbytes(rows, rows, rows, plan[1], gates),
        ),
        "moe_mlp": (
            lambda: GLAM._moe_mlp_forward(x, gates, *plan, *experts),
            nbytes(x, gates, *plan, wi, wo, y, pre),
        ),
        "moe_mlp backward": (
            lambda: GLAM._moe_mlp_backward(y, x, gates, *plan, pre, pre_gate, *experts),
            nbytes(y, x, x, gates, gates, *plan, wi, wo, wi, wo, pre),
        ),
    }


def dense_cases(s: Sizes) -> Cases:
    x, scale = torch.randn(s.T, s.D).bfloat16(), torch.randn(s.D)
    embedding, tokens = torch.randn(s.V, s.D).bfloat16(), torch.randint(s.V, (s.T,))
    hidden, output, targets = x[: s.T // 4], torch.randn(8 * s.V, s.D).bfloat16(), torch.randint(8 * s.V, (s.T // 4,))
    logits, per_token = torch.empty(s.T // 4, 8 * s.V), torch.empty(s.T // 4)  # float32; the logits' gradients bfloat16
    return {
        "rms_norm": (lambda: GLAM.rms_norm(x, scale), nbytes(x, x, scale)),
        "rms_norm backward": (lambda: GLAM._rms_norm_backward(x, x, scale, 1e-6), nbytes(x, x, x, scale, scale)),
        "embedding": (lambda: GLAM.embedding(tokens, embedding), nbytes(x, x, tokens)),
        "embedding backward": (
            lambda: GLAM._embedding_backward(x, tokens, s.V),
            nbytes(x, embedding, tokens, tokens),
        ),
        "linear_cross_entropy, statistics": (
            lambda: GLAM._vocabulary_statistics(hidden, output, targets, 1.0, 0.0, 0, 8 * s.V),
            nbytes(logits, targets, *(per_token,) * 3),
        ),
        "linear_cross_entropy, both gradients too": (
            lambda: GLAM._linear_cross_entropy_with_gradients(
                hidden, output, targets, None, 1.0, 0.0, 0.0, 0.0, True, True
            ),
            nbytes(logits, logits, logits.bfloat16(), targets, targets, *(per_token,) * 8),
        ),
    }


def attention_cases(s: Sizes) -> Cases:
    bias = torch.randn(s.H, 32)
    scores, beams = torch.empty(s.B, s.H, s.S, s.S), torch.arange(8).flip(0)
    k_cache, v_cache = (torch.randn(s.B, s.S, s.H, s.A).bfloat16() for _ in range(2))
    new = torch.randn(s.B, 1, s.H, s.A).bfloat16()
    positions = torch.full((s.B,), s.S - 1, dtype=torch.int32)
    beam_cache = torch.randn(8, s.S, s.H, s.A).bfloat16()

    def forward(dtype: torch.dtype) -> tuple[Tensor, ...]:
        q, k, v = (torch.randn(s.B, s.S, s.H, s.A).to(dtype) for _ in range(3))
        return q, k, v, *GLAM._relative_attention_forward(q, k, v, bias, None, True, 0.0)

    def calls(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Callable[[], object], ...]:
        return (
            lambda: GLAM._relative_attention_forward(q, k, v, bias, None, True, 0.0),
            lambda: GLAM._relative_attention_backward(out, q, k, v, bias, None, lse, True, 0.0),
        )

    half, single = forward(torch.bfloat16), forward(torch.float32)
    lse, biases = half[4], scores[0].bfloat16()
    return {
        "relative_attention": (calls(*half)[0], nbytes(biases, lse, lse, lse)),
        "relative_attention backward": (calls(*half)[1], nbytes(biases, scores.bfloat16(), lse, lse, bias)),
        "relative_attention, float32": (calls(*single)[0], nbytes(scores, scores, lse, lse)),
        "relative_attention backward, float32": (calls(*single)[1], nbytes(*(scores,) * 5, lse, bias)),
        "relative_attention_step": (
            lambda: GLAM.relative_attention_step(new, new, new, k_cache, v_cache, positions, bias),
            nbytes(new, new, new, new, k_cache, v_cache),
        ),
        "reorder_cache_": (lambda: GLAM.reorder_cache_(beam_cache, beams), nbytes(beam_cache, beam_cache, beams)),
    }


def optimizer_cases(s: Sizes) -> Cases:
    weight, grad = torch.randn(2, s.D, s.matrix), torch.randn(2, s.D, s.matrix)
    row_var, col_var, variance = torch.rand(2, s.D), torch.rand(2, s.matrix), torch.rand(2, s.D, s.matrix)
    step, rate, skip = torch.tensor(3), torch.tensor(1e-2), torch.tensor(False)
    none, sizes = torch.empty(0), [weight.numel()]
    lists, state, whole_state = ([grad], [weight]), ([row_var], [col_var], [grad]), ([variance], [none], [grad])
    sums = GLAM.adafactor_sums(*lists, [True])
    means, scaled = GLAM.adafactor_stats_(*state, *sums[:2], step, skip, [s.D], [s.matrix])
    moments = means, sums[2], GLAM.adafactor_update_squares(means, scaled, [2])
    whole = GLAM.adafactor_sums(*lists, [False])
    ones, squares = GLAM.adafactor_stats_(*whole_state, *whole[:2], step, skip, [1], [1])
    return {
        "adafactor_sums": (lambda: GLAM.adafactor_sums(*lists, [True]), nbytes(grad, weight)),
        "adafactor_stats_": (
            lambda: GLAM.adafactor_stats_(*state, *sums[:2], step, skip, [s.D], [s.matrix]),
            nbytes(grad),
        ),
        "adafactor_update_squares": (
            lambda: GLAM.adafactor_update_squares(means, scaled, [2]),
            nbytes(means, scaled, moments[2]),
        ),
        "adafactor_apply_": (
            lambda: GLAM.adafactor_apply_([weight], [grad], [row_var], [col_var], *moments, rate, skip, sizes),
            nbytes(weight, weight, grad),
        ),
        "adafactor_stats_, unfactored": (
            lambda: GLAM.adafactor_stats_(*whole_state, *whole[:2], step, skip, [1], [1]),
            nbytes(grad, variance, variance),
        ),
        "adafactor_apply_, unfactored": (
            lambda: GLAM.adafactor_apply_(
                [weight], [grad], [variance], [none], ones, whole[2], squares, rate, skip, sizes
            ),
            nbytes(weight, weight, grad, variance),
        ),
        "squared_norm": (lambda: GLAM.squared_norm([grad]), nbytes(grad)),
        "ordered_sum": (lambda: GLAM.ordered_sum(grad), nbytes(grad)),
    }


def sampling_cases(s: Sizes) -> Cases:
    logits, numbers = torch.randn(16, 8 * s.V), torch.rand(16)
    index = torch.arange(s.T * s.D)
    return {
        "sample_logits, temperature 0": (lambda: GLAM.sample_logits(logits, numbers, 0.0), nbytes(logits)),
        "sample_logits": (lambda: GLAM.sample_logits(logits, numbers), nbytes(logits)),
        "counter_uniform": (lambda: GLAM.counter_uniform(1, 2, index), nbytes(index) + 4 * index.numel()),
    }


def cases(s: Sizes) -> Cases:
    found: Cases = {}
    for part in (routing_cases, dense_cases, attention_cases, optimizer_cases, sampling_cases):
        torch.manual_seed(0)  # so that a case more in one does not change the counts of the next
        found |= part(s)
    return found


class Emulator:
    """The emulated kernels, taking the place of the CPU's, and their counters."""

    def __init__(self, library: str) -> None:
        torch.ops.load_library(library)
        self.library = ctypes.CDLL(library)
        self.library.glam_emulator_report.restype = ctypes.c_char_p

    def report(self, call: Callable[[], object]) -> dict[str, list[dict[str, Any]]]:
        """The launches and accesses of a call (csrc/cuda/emulator/counters.h)."""
        self.library.glam_emulator_start_counting()
        call()
        self.library.glam_emulator_stop_counting()
        return json.loads(self.library.glam_emulator_report())


@dataclass(frozen=True)
class Traffic:
    """What a call touches: sectors and passes, and how many would do."""

    needed_bytes: int
    sectors: int
    needed_sectors: int
    passes: int
    needed_passes: int

    @property
    def touched(self) -> float:
        return self.sectors * SECTOR / self.needed_bytes

    @property
    def uncoalesced(self) -> float:
        return (self.sectors - self.needed_sectors) / max(self.sectors, 1)

    @property
    def bank_passes(self) -> float | None:
        return self.passes / self.needed_passes if self.needed_passes else None


def measured(emulator: Emulator, sizes: Sizes) -> dict[str, Traffic]:
    found = {}
    for name, (call, needed_bytes) in cases(sizes).items():
        accesses = emulator.report(call)["accesses"]
        totals = [
            sum(access[key] for access in accesses if access["space"] == space)
            for space in ("global", "shared")
            for key in ("cost", "needed")
        ]
        found[name] = Traffic(needed_bytes, *totals)
    return found


def rows(found: dict[str, Traffic]) -> list[list[str]]:
    head = ["op", "necessary MB", "touched / necessary", "uncoalesced", "bank passes", *(f"us {gpu}" for gpu in RATES)]
    lines = [head]
    for name, traffic in found.items():
        passes = traffic.bank_passes
        lines.append(
            [
                name,
                f"{traffic.needed_bytes / 1e6:.2f}",
                f"{traffic.touched:.2f}",
                f"{traffic.uncoalesced:.1%}",
                "none" if passes is None else f"{passes:.2f}",
                *(f"{traffic.sectors * SECTOR / rate * 1e6:.1f}" for rate in RATES.values()),
            ]
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="the emulated kernels (csrc/cuda/emulator)")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = rows(measured(Emulator(options.library), Sizes()))
    if options.write:
        replace_part("traffic", table(lines, markdown=True))
    else:
        print(table(lines, options.markdown))


if __name__ == "__main__":
    main()
