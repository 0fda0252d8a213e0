"""The memory traffic of every CUDA kernel, counted by the emulator: no GPU is needed.

    python benchmarks/gpu_traffic.py build/cuda-emulated/libglam_cuda_emulated.so [--markdown]

Per op: the bytes it must move (each input read once, each output written once), the bytes of the 32-byte sectors that
its warps touch in global memory over them, the share of those sectors that the same bytes would not need (uncoalesced
access), and the passes over shared memory's banks over those needed. What a cache would serve counts as touched, so the
ratio is an upper bound of the traffic to memory. The last columns are the time that the touched bytes take at the
memory rates of the datasheets: 2.04 TB/s for an A100 with 80 GB, 3.35 TB/s for an H100 SXM.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable

import torch
from torch import Tensor

import glam_ext  # noqa: F401  (registers torch.ops.glam)

GLAM = torch.ops.glam
SECTOR = 32
RATES = {"A100": 2.04e12, "H100": 3.35e12}
T, D, E, V, TABLE = 1024, 256, 16, 512, 384


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cases() -> dict[str, tuple[Callable[[], object], int]]:
    """Op -> a call of it and the bytes it must move. bfloat16 activations, float32 weights."""
    torch.manual_seed(0)
    logits = torch.randn(T, E)
    gates, ids, positions, aux = GLAM.top2_gating(logits, None, None, T // 4)
    grads = torch.randn_like(gates), torch.randn_like(aux)
    plan = GLAM.routing_plan(ids, positions, E)
    x, scale = torch.randn(T, D).bfloat16(), torch.randn(D)
    rows = GLAM.dispatch(x, *plan)
    table, tokens = torch.randn(TABLE, D).bfloat16(), torch.randint(TABLE, (T,))
    weight, grad = torch.randn(2, D, V), torch.randn(2, D, V)
    row_var, col_var = torch.rand(2, D), torch.rand(2, V)
    step, rate, skip = torch.tensor(3), torch.tensor(1e-2), torch.tensor(False)
    sums = GLAM.adafactor_sums(grad, weight, True)
    totals = GLAM.adafactor_stats_(row_var, col_var, grad, *sums[:2], step, skip, D, V)
    means, squares = totals[0] / D, (totals[0] / D * totals[1]).sum()
    return {
        "top2_gating": (
            lambda: GLAM.top2_gating(logits, None, None, T // 4),
            nbytes(logits, gates, ids, positions, aux),
        ),
        "top2_gating backward": (
            lambda: GLAM._top2_gating_backward(*grads, logits, ids, positions, T // 4, True),
            nbytes(logits, logits, gates, ids, positions),
        ),
        "routing_plan": (lambda: GLAM.routing_plan(ids, positions, E), nbytes(ids, positions, *plan)),
        "dispatch": (lambda: GLAM.dispatch(x, *plan), nbytes(rows, rows, plan[1])),
        "dispatch backward": (lambda: GLAM._dispatch_backward(rows, *plan), nbytes(rows, x, plan[0])),
        "combine": (lambda: GLAM.combine(rows, gates, *plan), nbytes(rows, x, plan[0], gates)),
        "combine backward": (
            lambda: GLAM._combine_backward(x, rows, gates, *plan),
            nbytes(rows, rows, rows, plan[1], gates),
        ),
        "rms_norm": (lambda: GLAM.rms_norm(x, scale), nbytes(x, x, scale)),
        "rms_norm backward": (lambda: GLAM._rms_norm_backward(x, x, scale, 1e-6), nbytes(x, x, x, scale, scale)),
        "embedding": (lambda: GLAM.embedding(tokens, table), nbytes(x, x, tokens)),
        "embedding backward": (lambda: GLAM._embedding_backward(x, tokens, TABLE), nbytes(x, table, tokens)),
        "adafactor_sums": (lambda: GLAM.adafactor_sums(grad, weight, True), nbytes(grad, weight)),
        "adafactor_stats_": (
            lambda: GLAM.adafactor_stats_(row_var, col_var, grad, *sums[:2], step, skip, D, V),
            nbytes(grad),
        ),
        "adafactor_apply_": (
            lambda: GLAM.adafactor_apply_(
                weight, grad, row_var, col_var, means, sums[2], squares, rate, skip, weight.numel()
            ),
            nbytes(weight, weight, grad),
        ),
        "squared_norm": (lambda: GLAM.squared_norm(grad), nbytes(grad)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="the emulated kernels (csrc/cuda/emulator)")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    torch.ops.load_library(options.library)
    emulator = ctypes.CDLL(options.library)
    emulator.glam_emulator_report.restype = ctypes.c_char_p

    head = ["op", "MB", "moved", "uncoalesced", "bank passes", *(f"us {name}" for name in RATES)]
    print(f"T = {T}, D = {D}, E = {E}, table of {TABLE} rows, weights [2, {D}, {V}]; bfloat16 activations")
    separator = " | " if options.markdown else "  "
    print(("| " if options.markdown else "") + separator.join(head) + (" |" if options.markdown else ""))
    if options.markdown:
        print("|" + "---|" * len(head))
    for name, (call, needed_bytes) in cases().items():
        emulator.glam_emulator_start_counting()
        call()
        emulator.glam_emulator_stop_counting()
        accesses = json.loads(emulator.glam_emulator_report())["accesses"]
        cost, needed = (
            {space: sum(a[key] for a in accesses if a["space"] == space) for space in ("global", "shared")}
            for key in ("cost", "needed")
        )
        moved = cost["global"] * SECTOR
        cells = [
            name,
            f"{needed_bytes / 1e6:.2f}",
            f"{moved / needed_bytes:.2f}",
            f"{(cost['global'] - needed['global']) / max(cost['global'], 1):.1%}",
            f"{cost['shared'] / needed['shared']:.2f}" if needed["shared"] else "none",
            *(f"{moved / rate * 1e6:.1f}" for rate in RATES.values()),
        ]
        print(("| " if options.markdown else "") + separator.join(cells) + (" |" if options.markdown else ""))


if __name__ == "__main__":
    main()
