"""Cross entropy of the output layer, forward and backward, against its products alone and the plain composition.

    python benchmarks/loss.py

T = 1024 tokens, D = 768, V = 32,000, bfloat16 or float32 hidden, float32 embedding, float32 gradient of the embedding.

products  three products of that size (logits, gradient of hidden, gradient of embedding) at the dense rate
          (benchmarks/reference_rates.py)
plain     cross_entropy(hidden @ embedding.T), logits in hidden's dtype, the softmax in float32
wide      V = 256,000, T = 2048, D = 512, bfloat16: too many logits to keep any; the time is compared with its three
          products, and the peak of memory beyond parameters, inputs and gradients is printed
"""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from collections.abc import Callable

import torch
from common import PeakMemory, medians, parser, print_header
from reference_rates import dense_rate
from torch import Tensor


def inputs(T: int, D: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(T, D, dtype=dtype).requires_grad_()
    embedding = torch.randn(V, D).div_(D**0.5).requires_grad_()
    return hidden, embedding, torch.randint(V, (T,))


def ours(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    return torch.ops.glam.linear_cross_entropy(hidden, embedding, targets, None)[0]


def plain(hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ embedding.to(hidden.dtype).t()
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def step(loss: Callable[..., Tensor], arguments: tuple[Tensor, Tensor, Tensor]) -> None:
    (loss(*arguments) / 1000).backward()
    for x in arguments[:2]:
        x.grad = None


def compare(
    T: int, D: int, V: int, dtype: torch.dtype, losses: dict[str, Callable[..., Tensor]], dense: float, repeats: int
) -> None:
    given = inputs(T, D, V, dtype)
    seconds = medians({name: functools.partial(step, loss, given) for name, loss in losses.items()}, repeats)
    bound = 3 * 2 * T * D * V / dense
    line = f"  V {V:<7} {seconds['ours'] * 1e3:.0f} ms, {seconds['ours'] / bound:.2f} of three products"
    if "plain" in seconds:
        line += f"; plain {seconds['plain'] / seconds['ours']:.2f} of ours"
    print(line)


def memory() -> None:
    T, D, V = 2048, 512, 256_000
    step(ours, inputs(16, D, 64, torch.bfloat16))
    arguments = inputs(T, D, V, torch.bfloat16)
    gc.collect()
    with PeakMemory() as peak:
        step(ours, arguments)
    gradients = sum(x.nbytes for x in arguments[:2])
    print(f"wide      {(peak.peak - peak.before - gradients) / 1e6:.0f} MB beyond parameters, inputs and gradients")


def main() -> None:
    known = parser(__doc__ or "")
    known.add_argument("--memory", action="store_true", help="only that of `wide`, in this process")
    arguments = known.parse_args()
    if arguments.memory:
        memory()
        return
    print_header()
    subprocess.run([sys.executable, __file__, "--memory"], check=True)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.bfloat16, torch.float32):
            dense, _ = dense_rate(dtype, 2048, 768, 3072, arguments.repeats)
            print(f"{threads} threads {str(dtype)[6:]}: dense {dense / 1e9:.0f} GFLOP/s")
            compare(1024, 768, 32_000, dtype, {"ours": ours, "plain": plain}, dense, arguments.repeats)
            if dtype == torch.bfloat16:
                compare(2048, 512, 256_000, dtype, {"ours": ours}, dense, 3)


if __name__ == "__main__":
    main()
