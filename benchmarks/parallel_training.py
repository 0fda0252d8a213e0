"""Training on many processes against one: the same global batch, the same number of cores.

    python benchmarks/parallel_training.py

The preset `debug` (8 experts), 64 rows of 256 tokens a step in micro-batches of 8, bfloat16, Adafactor. One process of
N threads and N processes of one thread take turns, the experts spread over the processes (1 x N) or copied (N x 1);
tokens/s are of the median step after a first one. Then where the time of a step goes on the first rank, op by op, at 1,
2 and 4 processes of one thread (more processes than cores wait for each other); what an exchange op shows is waiting.
"""

from __future__ import annotations

import argparse
import collections
import os
import statistics
import time

import torch
from common import print_header
from ranks import run_ranks

ROWS, LENGTH, MICRO_ROWS = 64, 256, 8


def steps(expert: int, chunks: int, count: int, profile: bool) -> tuple[list[float], dict[str, float]]:
    from glam_ext import GLaM, GLaMConfig
    from glam_ext.data import Batch, Whole
    from glam_ext.distributed import GradientReducer, init_mesh
    from glam_ext.training import TrainingConfig
    from glam_ext.training.config import DataSection, RunSection
    from glam_ext.training.optimizers import make_updater
    from glam_ext.training.step import accumulate_gradients

    mesh = init_mesh(expert)
    config = GLaMConfig.preset("debug")
    group = mesh.group_name("expert")
    model = GLaM(config, expert_group=group, exchange_chunks=chunks if group else 1)
    reducer = GradientReducer.of_model(model, mesh)
    run = RunSection(name="benchmark", steps=count)
    updater = make_updater(
        TrainingConfig(run=run, model=config, data=DataSection(train="-", batch_size=ROWS)), model, group
    )
    share = ROWS // mesh.world_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, config.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    tokens = tokens[mesh.rank * share : (mesh.rank + 1) * share]
    ones = torch.ones(share, LENGTH, dtype=torch.int32)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ones.float(), ones)
    whole = Whole(ROWS, ROWS * LENGTH, mesh.rank * share)

    def step(index: int) -> None:
        sums = accumulate_gradients(model, batch, min(MICRO_ROWS, share), whole=whole, reducer=reducer, step=index)
        sums.over_ranks(mesh)
        updater.update(index)

    times = []
    for index in range(count):
        start = time.perf_counter()
        step(index)
        times.append(time.perf_counter() - start)
    ops: dict[str, float] = collections.Counter()
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            start = time.perf_counter()
            step(count)
            total = time.perf_counter() - start
        for event in profiler.key_averages():
            if not event.key.startswith("gloo"):  # those run beside the rest
                ops[event.key] += event.self_cpu_time_total / 1e6 / total
    return times, dict(ops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    cores = arguments.cores
    print_header()
    layouts = {f"1 process x {cores} threads": (1, cores, 1), f"{cores} x 1, experts spread": (cores, 1, cores),
               f"{cores} x 1, experts copied": (cores, 1, 1)}  # fmt: skip
    times: dict[str, list[float]] = collections.defaultdict(list)
    for _ in range(arguments.rounds):
        for name, (processes, threads, expert) in layouts.items():
            times[name] += run_ranks(processes, threads, steps, expert, 1, arguments.steps, False)[0][1:]
    print("layout                       tokens/s   of one process")
    rates = {name: ROWS * LENGTH / statistics.median(values) for name, values in times.items()}
    for name, rate in rates.items():
        print(f"{name:<28} {rate:<10.0f} {rate / next(iter(rates.values())):.2f}")
    for processes in (1, 2, 4):
        _, ops = run_ranks(processes, 1, steps, processes, 1, 1, True)
        print(f"{processes} x 1, share of a step:", end="")
        for name, share in sorted(ops.items(), key=lambda item: -item[1])[:12]:
            print(f"  {name} {share:.1%}", end="")
        print()


if __name__ == "__main__":
    main()
