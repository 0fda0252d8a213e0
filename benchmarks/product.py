"""The product core against torch: glam::linear beside x @ w, as GFLOP/s and as a ratio.

python benchmarks/product.py
"""

from __future__ import annotations

import torch
from common import medians, parser, print_header

SHAPES = [(2048, 768, 3072), (4096, 256, 1024), (1, 768, 3072)]


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    print_header()
    print("dtype     M     K     N     threads  glam GF/s  torch GF/s  glam / torch")
    for dtype in (torch.float32, torch.bfloat16):
        for m, k, n in SHAPES:
            x, w = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                contenders = {"glam": lambda x=x, w=w: torch.ops.glam.linear(x, w), "torch": lambda x=x, w=w: x @ w}
                seconds = medians(contenders, arguments.repeats)
                rate = {name: 2e-9 * m * k * n / value for name, value in seconds.items()}
                shape = f"{str(dtype)[6:]:9} {m:<5} {k:<5} {n:<5} {threads:<8}"
                print(shape, f"{rate['glam']:<10.1f} {rate['torch']:<11.1f} {rate['glam'] / rate['torch']:.2f}")


if __name__ == "__main__":
    main()
