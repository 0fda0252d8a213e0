"""Attention with a learned relative bias, forward and backward, against torch's with and without a bias.

    python benchmarks/attention.py

B = 2, S = 1024, H = 12, A = 64, causal. GFLOP/s count the causal half of seven products (two forward, five backward).

bias    scaled_dot_product_attention with a bias [1, H, S, S] that holds the mask and receives a gradient; making it
        from the table [H, 32] and the table's gradient are left out
flash   scaled_dot_product_attention without a bias, is_causal
dense   the rate of one large product (benchmarks/reference_rates.py)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import medians, parser, print_header
from reference_rates import dense_rate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

B, S, H, A = 2, 1024, 12, 64


def step(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    grad = torch.randn_like(run())

    def call() -> None:
        run().backward(grad)
        for x in inputs:
            x.grad = None

    return call


def contenders(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    q, k, v = ((torch.randn(B, S, H, A) / A**0.25).to(dtype).requires_grad_() for _ in range(3))
    table = torch.randn(H, 32).requires_grad_()
    mask = torch.full((S, S), float("-inf"), dtype=dtype).triu(1)
    bias = (torch.randn(1, H, S, S, dtype=dtype) + mask).requires_grad_()

    def theirs(attn_mask: Tensor | None) -> Tensor:
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        return scaled_dot_product_attention(*heads, attn_mask=attn_mask, is_causal=attn_mask is None, scale=1.0)

    return {
        "ours": step(lambda: torch.ops.glam.relative_attention(q, k, v, table, None, True, 0.0), [q, k, v, table]),
        "bias": step(lambda: theirs(bias), [q, k, v, bias]),
        "flash": step(lambda: theirs(None), [q, k, v]),
    }


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    print_header()
    flops = 7 * 2 * B * H * A * S * S / 2
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            dense, _ = dense_rate(dtype, 2048, 768, 3072, arguments.repeats)
            seconds = medians(contenders(dtype), arguments.repeats)
            rates = "  ".join(f"{name} {flops / value / 1e9:.0f}" for name, value in seconds.items())
            rate = flops / seconds["ours"] / dense
            print(f"{threads} threads {str(dtype)[6:]:<9} GFLOP/s: {rates}; ours {rate:.2f} of dense {dense / 1e9:.0f}")
            print("  " + ", ".join(f"{seconds[name] / seconds['ours']:.2f} x {name}" for name in ("bias", "flash")))


if __name__ == "__main__":
    main()
