"""What ops ask of the device when only the values of their arguments change: a program over the emulated kernels.

    python -m tests.cuda.launches LIBRARY OP...

Prints JSON: by op and sample, for every variant of the sample's values, the launches (kernel, grid, block, bytes of
shared memory), the sizes of all allocations, the outputs' shapes and strides, and whether a value came to the host.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import glam_ext  # noqa: F401  (registers torch.ops.glam)
from tests.ops import levels, samples
from tests.ops.samples import Op, Sample
from tests.ops.samples.base import Args, generator_of, randint, randn, uniform
from tests.ops.samples.routing import routed

DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = ("as it is", "shuffled", "equal", "not a number")
HOST_READS = ("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
PLAN = ("row_of_choice", "choice_of_row", "offsets")


# --- Ops without samples of their own


def _adafactor() -> dict[str, list[Sample]]:
    """Of a list of 60 parameters, more than one launch takes."""
    shapes = [((2, 33, 70), True), ((7,), False), ((3, 8), True)] * 20
    factored = [flag for _, flag in shapes]
    weights, grads = (
        [randn(f"{part} {i}", *shape, dtype=torch.float32) for i, (shape, _) in enumerate(shapes)]
        for part in ("weight", "grad")
    )
    row_vars = [uniform(f"row {i}", *(shape[:-1] if flag else shape)) for i, (shape, flag) in enumerate(shapes)]
    col_vars = [uniform(f"column {i}", *(*x[:-2], x[-1]) if flag else (0,)) for i, (x, flag) in enumerate(shapes)]
    sizes = [shape[-2:] if flag else (1, 1) for shape, flag in shapes]
    row_sums, col_sums, squares = torch.ops.glam.adafactor_sums(grads, weights, factored)
    step, rate, skip = torch.tensor(3), torch.tensor(1e-2, dtype=torch.float64), torch.tensor(False)
    means, scaled, matrices = uniform("means", 80).double(), uniform("scaled", 80).double(), [2, 1, 1] * 20
    states = (row_vars, col_vars, grads)
    numels = [weight.numel() for weight in weights]
    return {
        "adafactor_sums": [Sample("many", (grads, weights, factored))],
        "adafactor_stats_": [
            Sample("many", (*states, row_sums, col_sums, step, skip, *map(list, zip(*sizes, strict=True))))
        ],
        "adafactor_update_squares": [Sample("many", (means, scaled, matrices))],
        "adafactor_apply_": [
            Sample("many", (weights, grads, row_vars, col_vars, means, squares, squares, rate, skip, numels))
        ],
    }


def _other_samples() -> dict[str, list[Sample]]:
    ids, positions = routed("statistics", 40, 6)
    logits, numbers = randn("logits", 5, 70, dtype=torch.float32), uniform("numbers", 5)
    return {
        **_adafactor(),
        "squared_norm": [Sample("three", ([randn(f"{n}", n, dtype=torch.float32) for n in (3, 5000, 0)],))],
        "ordered_sum": [Sample(str(n), (randn(f"{n}", n, dtype=torch.float32),)) for n in (3, 5000)],
        "router_statistics": [Sample("small", (ids, positions, 6))],
        "counter_uniform": [Sample("small", (7, 3, randint("index", 1000, 5, 9)))],
        "sample_logits": [
            Sample(str(options), (logits, numbers, *options))
            for options in ((0.0,), (1.0,), (0.7, 5), (1.3, 0, 0.8), (1.0, 9, 0.5))
        ],
    }


OTHER = (
    *("adafactor_sums", "adafactor_stats_", "adafactor_update_squares", "adafactor_apply_", "squared_norm"),
    *("ordered_sum", "router_statistics", "counter_uniform", "sample_logits"),
)
OPS = (*(op.name for op in samples.OPS), *OTHER)


def cases(name: str) -> list[tuple[Op, str, Sample]]:
    for op in samples.OPS:
        if op.name == name:
            chosen = [("small", dtype) for dtype in DTYPES] + [("edges", torch.float32)]
            return [
                (op, f"{sample.name}, {level}, {dtype}", sample)
                for level, dtype in chosen
                for sample in op.samples(level, dtype)
            ]
    op = Op(name, lambda *args: (), lambda level, dtype: [], differentiable=())
    return [(op, sample.name, sample) for sample in _other_samples()[name]]


# --- Other values of the same shapes


def vary(value: Any, variant: str) -> Any:
    if isinstance(value, list):
        return [vary(part, variant) for part in value]
    if not isinstance(value, Tensor) or value.numel() == 0:
        return value
    if variant == "not a number":
        return torch.full_like(value, torch.nan) if value.is_floating_point() else value
    if variant == "equal":
        fill = True if value.dtype == torch.bool else value.min()
        return torch.full_like(value, fill)
    order = torch.randperm(value.numel(), generator=generator_of(variant))
    shuffled = value.flatten()[order].view(value.shape)
    return shuffled * 0.75 if value.is_floating_point() else shuffled


def vary_plan(plan: dict[str, Tensor], variant: str) -> dict[str, Tensor]:
    """Shuffled: the tokens change places and the segments' borders move. Equal: no choice has a row."""
    varied = {name: value.clone() for name, value in plan.items()}
    if variant == "shuffled":
        if "row_of_choice" in plan:
            tokens, choices = plan["row_of_choice"].shape
            order = torch.randperm(tokens, generator=generator_of(variant))
            varied["row_of_choice"] = plan["row_of_choice"][order]
            old = plan["choice_of_row"].long()
            new = order.argsort()[old.clamp(min=0) // max(choices, 1)] * choices + old % max(choices, 1)
            varied["choice_of_row"] = torch.where(old < 0, old, new).int()
        varied["offsets"][1:-1] = varied["offsets"][-1] // 3
    elif variant == "equal":
        for name in plan:
            varied[name].fill_(0 if name == "offsets" else -1)
    return varied


def other_values(op: Op, sample: Sample, variant: str) -> Args:
    if variant == "as it is":
        return sample.args
    if op.name == "routing_plan" and variant != "not a number":
        ids, _, experts, group, slots = sample.args
        kinds = 1 if variant == "equal" else experts  # all to expert 0
        return (*routed(variant, ids.shape[0], kinds, ids.shape[1], group, slots), experts, group, slots)
    names = [argument.name for argument in getattr(torch.ops.glam, op.name).default._schema.arguments]
    args = dict(zip(names, sample.args, strict=False))
    plan = {name: args[name] for name in PLAN if name in args}
    varied = {name: vary(value, variant) for name, value in args.items()}
    if op.name == "exchange_mlp":
        varied |= plan  # its splits, which the host knows, agree with the segments
    elif plan:
        varied |= vary_plan(plan, variant)
    return tuple((args | varied).values())


# --- What was asked of the device


def profiled(work: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """What `work` returns, and the calls and allocations under it, also those inside ops."""
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        result = work()
    return result, profile.kineto_results.events()


def host_reads(events: list[Any]) -> list[str]:
    return sorted({event.name() for event in events} & set(HOST_READS))


def record(emulator: ctypes.CDLL, op: Op, sample: Sample) -> dict[str, Any]:
    emulator.glam_emulator_start_counting()
    results, events = profiled(lambda: levels.run_with_gradients(op, sample))
    emulator.glam_emulator_stop_counting()
    launches = json.loads(emulator.glam_emulator_report())["launches"]
    return {
        "launches": [(x["kernel"], x["grid"], x["block"], x["shared_bytes"]) for x in launches],
        "allocations": [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0],
        "host reads": host_reads(events),
        "outputs": [(str(x.dtype), list(x.shape), list(x.stride())) for x in results],
    }


def main() -> None:
    library, *names = sys.argv[1:]
    torch.ops.load_library(library)
    emulator = ctypes.CDLL(library)
    emulator.glam_emulator_report.restype = ctypes.c_char_p
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in names:
        found[name] = {}
        for op, title, sample in cases(name):
            variants = [Sample(sample.name, other_values(op, sample, variant), sample.grad) for variant in VARIANTS]
            found[name][title] = [record(emulator, op, varied) for varied in variants]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
