"""Rows between two ranks: glam::exchange against torch's all_to_all_single, and how much of it overlap hides.

    python benchmarks/exchange.py

Two processes of one thread, Gloo. First the transfer alone: R rows of D = 768 in bfloat16, half of them to the other
rank, the same bytes for both. Then experts behind an exchange (exchange_mlp, forward and backward) over links of given
latency and bandwidth, which are simulated: a transfer that is done early is held back. The share that chunks hide is of
the time that the slow link adds to a run without chunks. Times are medians of alternating runs.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from common import medians, print_header
from ranks import SlowLink, run_ranks

D, F, EXPERTS = 768, 3072, 8


def synchronised(call: object) -> object:
    """Both ranks begin together: the time is that of the transfer, not of waiting for the other."""

    def run() -> None:
        dist.barrier()
        call()  # type: ignore[operator]

    return run


def transfers(repeats: int) -> list[tuple[int, float, float]]:
    from glam_ext.distributed import init_mesh

    group = init_mesh(expert=2).group_name("expert")
    found = []
    for rows in (64, 1024, 4096, 16384):
        x = torch.randn(rows, D).bfloat16()

        def raw(x: torch.Tensor = x) -> None:
            dist.all_to_all_single(torch.empty_like(x), x)

        def ours(x: torch.Tensor = x) -> None:
            torch.ops.glam.exchange(x, [], [], group)

        seconds = medians({"raw": synchronised(raw), "ours": synchronised(ours), "barrier": dist.barrier}, repeats)
        found.append((x.nbytes, seconds["raw"] - seconds["barrier"], seconds["ours"] - seconds["barrier"]))
    return found


def overlap(repeats: int) -> list[tuple[float, float, int, float, float]]:
    from glam_ext.distributed import init_mesh

    mesh = init_mesh(expert=2)
    fast = dist.group.WORLD
    local = EXPERTS // 2
    wi, wo = (torch.randn(local, *size).mul_(0.03).requires_grad_() for size in ((D, F), (F, D)))
    rows = torch.randn(EXPERTS * 128, D).bfloat16().requires_grad_()
    offsets = torch.arange(EXPERTS + 1, dtype=torch.int32) * 128
    found = []
    for latency, rate in ((1e-3, 1e9), (5e-3, 1e9), (20e-3, 1e9), (1e-3, 100e6)):
        link = f"link {latency} {rate}"
        group = SlowLink(fast, link, latency, rate)

        def layer(chunks: int, name: str) -> None:
            out = torch.ops.glam.exchange_mlp(rows, offsets, [], [], wi, wo, None, "relu", name, chunks)
            out.backward(out)
            for tensor in (rows, wi, wo):
                tensor.grad = None

        plain = mesh.group_name("expert")
        calls = {"none": synchronised(lambda p=plain: layer(1, p))}
        for chunks in (1, 2, 4):
            calls[str(chunks)] = synchronised(lambda c=chunks, n=link: layer(c, n))
        seconds = medians(calls, repeats)
        added = seconds["1"] - seconds["none"]
        for chunks in (1, 2, 4):
            found.append(
                (latency, rate, chunks, seconds[str(chunks)], 1 - (seconds[str(chunks)] - seconds["none"]) / added)
            )
        del group
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    print_header()
    print("bytes      all_to_all_single ms  exchange ms  ratio")
    for nbytes, raw, ours in run_ranks(2, 1, transfers, arguments.repeats):
        print(f"{nbytes:<10} {raw * 1e3:<21.3f} {ours * 1e3:<12.3f} {ours / raw:.2f}")
    print("latency ms  link MB/s  chunks  layer ms  share of the link's time hidden")
    for latency, rate, chunks, seconds, hidden in run_ranks(2, 1, overlap, arguments.repeats):
        print(f"{latency * 1e3:<11.1f} {rate / 1e6:<10.0f} {chunks:<7} {seconds * 1e3:<9.1f} {hidden:.2f}")


if __name__ == "__main__":
    main()
