"""Adafactor against its bytes, torch's Adafactor and a copy of the weights.

    python benchmarks/adafactor.py

40 M parameters in ten matrices of 2048 x 2048, float32, gradients given.

bound  24 bytes per parameter at the copy rate: the gradient is read in two passes and in the update, the weight in one
       pass and in the update, which writes it; second moments are a row and a column
torch  torch.optim.Adafactor; fused AdamW and a copy of all weights for scale
"""

from __future__ import annotations

import torch
from common import medians, parser, print_header
from reference_rates import copy_rate
from torch import Tensor

from glam_ext.optim import Adafactor

MATRICES, SIZE = 10, 2048


def weights() -> list[Tensor]:
    made = [torch.randn(SIZE, SIZE).requires_grad_() for _ in range(MATRICES)]
    for weight in made:
        weight.grad = torch.randn(SIZE, SIZE)
    return made


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    print_header()
    ours, theirs = Adafactor(weights(), 1e-3), torch.optim.Adafactor(weights(), lr=1e-3)
    adam = torch.optim.AdamW(weights(), lr=1e-3, fused=True)
    source, target = torch.randn(MATRICES, SIZE, SIZE), torch.empty(MATRICES, SIZE, SIZE)
    calls = {
        "ours": ours.step,
        "torch": theirs.step,
        "AdamW": adam.step,
        "copy": lambda: target.copy_(source),
    }
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        copy = copy_rate(arguments.repeats)
        seconds = medians(calls, arguments.repeats)
        bound = 24 * MATRICES * SIZE * SIZE / copy
        others = ", ".join(f"{name} {seconds[name] / seconds['ours']:.2f}" for name in ("torch", "AdamW", "copy"))
        print(
            f"{threads} threads: {seconds['ours'] * 1e3:.1f} ms, {seconds['ours'] / bound:.2f} of its bytes at "
            f"{copy / 1e9:.0f} GB/s; in units of ours: {others}"
        )


if __name__ == "__main__":
    main()
