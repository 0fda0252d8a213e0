"""Rows between two ranks: glam::exchange against torch's all_to_all_single, and how much of it overlap hides.

    python benchmarks/exchange.py

Two processes of one thread, Gloo. First the transfer alone: R rows of D = 768 in bfloat16, half of them to the other
rank, the same bytes for both; each runs twice a turn, and torch against itself says what a ratio means. Then experts
behind an exchange (exchange_mlp, forward and backward) against the same as three ops (exchange, expert_mlp, exchange),
of which nothing overlaps. The link is the processes' own, or one of given latency and bandwidth that is simulated: a
transfer that is done early is held back. Its time is what the layer's four transfers need. Share hidden: what of it
exchange_mlp saves; at most all but the first chunk's ways in and the forward pass's last way back. Times are medians of
alternating runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from common import medians, print_header
from ranks import SlowLink, run_ranks

D, F, EXPERTS, ROWS = 768, 3072, 8, 1024
LINKS = ((0.0, math.inf), (1e-3, 1e9), (5e-3, 1e9), (20e-3, 1e9), (1e-3, 100e6))  # seconds, bytes per second
CHUNKS = (0, 1, 2, 4)


def transfers(repeats: int) -> list[tuple[int, dict[str, float]]]:
    from glam_ext.distributed import init_mesh

    group = init_mesh(expert=2).group_name("expert")
    found = []
    for rows in (64, 1024, 4096, 16384):
        x = torch.randn(rows, D).bfloat16()

        def torchs(x: torch.Tensor = x) -> None:
            dist.all_to_all_single(torch.empty_like(x), x)

        def ours(x: torch.Tensor = x) -> None:
            torch.ops.glam.exchange(x, [], [], group)

        # No barrier: a transfer ends on both ranks at once, and so does each begin.
        calls = {"torch": torchs, "torch again": torchs, "glam": ours, "glam again": ours}
        found.append((x.nbytes, medians(calls, repeats)))
    return found


def overlap(repeats: int) -> dict[tuple[float, float, int], float]:
    """Seconds of a layer by latency, bandwidth (infinite: the own link) and chunks (0: three ops)."""
    from glam_ext.distributed import init_mesh

    own = init_mesh(expert=2).group_name("expert")
    local = EXPERTS // 2
    wi, wo = (torch.randn(local, *size).mul_(0.03).requires_grad_() for size in ((D, F), (F, D)))
    rows = torch.randn(ROWS, D).bfloat16().requires_grad_()
    offsets = torch.arange(EXPERTS + 1, dtype=torch.int32) * (ROWS // EXPERTS)
    glam = torch.ops.glam

    def layer(chunks: int, group: str) -> Callable[[], None]:
        def run() -> None:
            dist.barrier()
            if chunks == 0:
                out = glam.exchange(rows, [], [], group)
                out = glam.exchange(glam.expert_mlp(out, offsets, wi, wo, None, "relu"), [], [], group)
            else:
                out = glam.exchange_mlp(rows, offsets, [], [], wi, wo, None, "relu", group, chunks)
            out.backward(out)
            for tensor in (rows, wi, wo):
                tensor.grad = None

        return run

    found = {}
    for link in LINKS:
        slow = SlowLink(dist.group.WORLD, f"{link}", *link) if link[1] < math.inf else None
        name = f"{link}" if slow else own
        seconds = medians({f"{chunks}": layer(chunks, name) for chunks in CHUNKS}, repeats)
        found.update({(*link, chunks): seconds[f"{chunks}"] for chunks in CHUNKS})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    print_header()
    print("bytes      all_to_all_single ms  exchange ms  ratio  all_to_all_single to itself")
    for nbytes, seconds in run_ranks(2, 1, transfers, 16 * arguments.repeats):
        torchs, ours = ((seconds[name] + seconds[f"{name} again"]) / 2 for name in ("torch", "glam"))
        itself = seconds["torch again"] / seconds["torch"]
        print(f"{nbytes:<10} {torchs * 1e3:<21.3f} {ours * 1e3:<12.3f} {ours / torchs:<6.2f} {itself:.2f}")
    print("latency ms  link MB/s  link's time ms  chunks     layer ms  to three ops  share hidden  at most")
    layers = run_ranks(2, 1, overlap, arguments.repeats)
    for (latency, rate, chunks), seconds in layers.items():
        three_ops = layers[latency, rate, 0]
        sending = ROWS * D * 2 / 2 / rate  # bytes of bfloat16, half of which stay
        link = 4 * (latency + sending)
        line = f"{latency * 1e3:<11.0f} {rate / 1e6:<10.0f} {link * 1e3:<15.1f} {chunks or 'three ops':<10} "
        line += f"{seconds * 1e3:<9.1f} {seconds / three_ops:<13.2f}"
        if link > 0 and chunks > 0:
            at_most = 1 - 3 * (latency + sending / chunks) / link
            line += f" {(three_ops - seconds) / link:<13.2f} {at_most:.2f}"
        print(line)


if __name__ == "__main__":
    main()
