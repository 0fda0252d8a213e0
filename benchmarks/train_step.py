"""A whole training step: gradients, clipping and Adafactor, op by op against what this machine could do.

    python benchmarks/train_step.py [--peer]

12 layers, D = 768, F = 3072, 12 heads of 64, E = 8, V = 32,000; 2 sequences of 1024 random tokens, bfloat16 compute,
float32 parameters. Model FLOPs are three times the forward's (glam_ext.counts.flops_per_token, causal attention). Each
model has a process of its own; they take turns.

dense    the rate of one large product (benchmarks/reference_rates.py)
table    one profiled step: each op's share, and its time over its bound: FLOPs / dense rate, or bytes / copy rate
mlp      a model without experts, F = 3584: the same active FLOPs
peer     (--peer) the same model as most write it today: rows sorted by expert and torch's grouped product, attention by
         scaled_dot_product_attention with a learned bias, cross_entropy of the logits, torch.optim.Adafactor
"""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import peer_model
import torch
from common import parser, print_header
from reference_rates import copy_rate, dense_rate

from glam_ext import GLaM, GLaMConfig
from glam_ext.counts import flops_per_token
from glam_ext.data import Batch
from glam_ext.training import TrainingConfig
from glam_ext.training.config import DataSection, RunSection
from glam_ext.training.optimizers import make_updater
from glam_ext.training.step import accumulate_gradients

B, S = 2, 1024
CONFIG = GLaMConfig(
    vocab_size=32000,
    model_dim=768,
    hidden_dim=3072,
    num_layers=12,
    num_heads=12,
    head_dim=64,
    num_experts=8,
    compute_dtype="bfloat16",
)
WITHOUT_EXPERTS = dataclasses.replace(CONFIG, num_experts=0, hidden_dim=3584)


def random_batch() -> Batch:
    tokens = torch.randint(4, CONFIG.vocab_size, (B, S + 1))
    ones = torch.ones(B, S, dtype=torch.int32)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), ones.float(), ones)


def training(config: GLaMConfig, batch: Batch) -> Callable[[], None]:
    model = GLaM(config)
    sections = {"run": RunSection(name="benchmark", steps=1000), "data": DataSection(train="-", batch_size=B)}
    updater = make_updater(TrainingConfig(model=config, **sections), model, "")

    def step() -> None:
        accumulate_gradients(model, batch, B)
        updater.update(0)

    return step


MODELS: dict[str, Callable[[], Callable[[], None]]] = {
    "ours": lambda: training(CONFIG, random_batch()),
    "mlp": lambda: training(WITHOUT_EXPERTS, random_batch()),
    "peer": lambda: peer_model.training(CONFIG, random_batch()),
}


def serve(connection: Connection, name: str) -> None:
    """Does a step for each number of threads that it is sent, and answers with the seconds; None ends it."""
    step = MODELS[name]()
    while (threads := connection.recv()) is not None:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        step()
        connection.send(time.perf_counter() - start)


class Worker:
    """A model in a process of its own."""

    def __init__(self, name: str) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, name))
        self._process.start()

    def step(self, threads: int) -> float:
        self._connection.send(threads)
        return float(self._connection.recv())

    def stop(self) -> None:
        self._connection.send(None)
        self._process.join()


def model_flops(config: GLaMConfig) -> float:
    return 3.0 * B * S * flops_per_token(config, S / 2).total


def bounds(dense: float, copy: float) -> dict[str, float]:
    """Seconds of each op in a step at the reference rates."""
    flops = flops_per_token(CONFIG, S / 2)
    tokens, parameters = B * S, sum(p.numel() for p in GLaM(CONFIG, device="meta").parameters())
    return {
        "moe_mlp": 3 * tokens * flops.experts / dense,
        "geglu_mlp": 3 * tokens * flops.dense_ffn / dense,
        "linear": 3 * tokens * flops.attention_projections / dense,
        "relative_attention": 3.5 * tokens * flops.attention_scores / dense,  # the scores are multiplied again
        "linear_cross_entropy": 3 * tokens * flops.logits / dense,
        "adafactor": 24 * parameters / copy,
    }


# Names that an op's kernels have in a profile, besides its own.
PARTS = {
    "moe_mlp": ("moe_mlp",),
    "geglu_mlp": ("expert_mlp",),
    "linear": ("glam::linear", "_linear_weight_gradient"),
    "relative_attention": ("relative_attention",),
    "linear_cross_entropy": ("cross_entropy", "loss_gradients", "vocabulary_statistics"),
    "adafactor": ("adafactor",),
    "norm": ("rms_norm",),
    "gating": ("top2_gating", "routing_plan", "router"),
    "embedding": ("embedding",),
}


def print_profile(step: Callable[[], None], bound: dict[str, float]) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        total = time.perf_counter() - start
    seconds: dict[str, float] = collections.Counter()
    for event in profiler.key_averages():
        found = [op for op, names in PARTS.items() if any(name in event.key for name in names)]
        # linear is also in the loss's name.
        seconds[found[-1] if found else event.key] += event.self_cpu_time_total / 1e6
    for name, value in sorted(seconds.items(), key=lambda item: -item[1])[:16]:
        against = f"{value / bound[name]:.2f} of its bound" if name in bound else ""
        print(f"  {name:<32} {value * 1e3:7.0f} ms  {value / total:6.1%}  {against}")


def main() -> None:
    known = parser(__doc__ or "")
    known.add_argument("--peer", action="store_true")
    arguments = known.parse_args()
    print_header()
    workers = {name: Worker(name) for name in MODELS if name != "peer" or arguments.peer}
    machine: dict[int, tuple[float, float]] = {}
    for worker in workers.values():
        worker.step(max(arguments.threads))  # makes the model and its memory
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        dense, _ = dense_rate(torch.bfloat16, 2048, 768, 3072, 7)
        copy = copy_rate(7)
        machine[threads] = (dense, copy)
        turns = [
            {name: worker.step(threads) for name, worker in workers.items()}
            for _ in range(1 + max(2, arguments.repeats // 2))
        ]
        seconds = {name: statistics.median(turn[name] for turn in turns[1:]) for name in workers}
        ours = seconds["ours"]
        rate = model_flops(CONFIG) / ours
        print(
            f"{threads} threads: {B * S / ours:.0f} tokens/s, {rate / 1e9:.0f} GFLOP/s, {rate / dense:.2f} of the "
            f"dense {dense / 1e9:.0f}; copy {copy / 1e9:.0f} GB/s"
        )
        print(f"  model without experts {seconds['mlp'] / ours:.2f} of ours in time")
        if arguments.peer:
            print(f"  peer {seconds['peer'] / ours:.2f} of ours in time, {B * S / seconds['peer']:.0f} tokens/s")
    for worker in workers.values():
        worker.stop()
    step = training(CONFIG, random_batch())
    for threads, (dense, copy) in machine.items():
        torch.set_num_threads(threads)
        for _ in range(2):
            step()
        print(f"{threads} threads, op by op:")
        print_profile(step, bounds(dense, copy))


if __name__ == "__main__":
    main()
