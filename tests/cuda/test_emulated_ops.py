"""The ops' own tests over the emulated CUDA kernels: the kernels' sources and the glue that a GPU build has, behind the
CPU's dispatch key in a process of their own.

Left out are levels that cannot differ (compile, export, TorchScript and the refusal of double backward go through Meta
and Autograd alone) and tests of what the CPU kernels alone promise: errors for indices out of range, packed weights,
bits that do not depend on threads.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from .emulated import ROOT

LEVELS = (
    "test_reference or test_gradients or test_gradcheck or test_opcheck or test_poison or test_strides or "
    "test_batch_invariance"
)
OWN = (
    f"not ({LEVELS}) and not compile and not export and not torchscript and not double_backward and not threads "
    "and not bad and not refus and not raises"
)
# gradcheck is thousands of launches.
FAST = f"({LEVELS}) and (small or edges or cuda) and not gradcheck and not opcheck or {OWN}"
ALL = f"{LEVELS} or {OWN}"


# Files of tests/ops that share a process, whose start takes longer than most of them.
GROUPS = {
    "routing": ["top2_gating", "routing_plan", "dispatch", "combine", "moe_mlp", "accumulate_in_place"],
    "dense": ["expert_mlp", "geglu_mlp", "rms_norm", "embedding", "linear", "linear_cross_entropy"],
    "attention": ["relative_attention", "relative_attention_step", "reorder_cache"],
    "other": ["adafactor", "ordered_sum", "router_statistics", "sampling", "cuda_indices"],
}


def run_op_tests(ops: Sequence[str], chosen: str, **environment: str) -> None:
    """The chosen ones of tests/ops/test_{op}.py, in a process with this environment."""
    files = [f"tests/ops/test_{op}.py" for op in ops]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def run_emulated(library: Path, ops: Sequence[str], chosen: str, **environment: str) -> None:
    run_op_tests(ops, chosen, GLAM_TEST_LIBRARY=str(library), OMP_NUM_THREADS="1", **environment)


@pytest.mark.parametrize("group", GROUPS)
def test_ops(library: Path, group: str) -> None:
    run_emulated(library, GROUPS[group], FAST, GLAM_EMULATOR_SEED="1")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("op", [op for group in GROUPS.values() for op in group])
def test_op_in_every_order(library: Path, op: str, order: str) -> None:
    run_emulated(library, [op], ALL, GLAM_EMULATOR_ORDER=order, GLAM_EMULATOR_SEED="2")


LAUNCHES = """
import ctypes, json, sys
import torch, glam_ext
torch.ops.load_library(sys.argv[1])
emulator, glam = ctypes.CDLL(sys.argv[1]), torch.ops.glam
emulator.glam_emulator_report.restype = ctypes.c_char_p

def launches(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(40, 6, generator=generator)
    if seed == 1:
        logits[:, 2] += 100  # all tokens to one expert
    x = torch.randn(40, 8, generator=generator).requires_grad_()
    weights = [torch.randn(*s, generator=generator).requires_grad_() for s in ((6, 8, 5), (6, 5, 8))]
    table = torch.randn(9, 8, generator=generator).requires_grad_()
    ids = torch.randint(9, (40,), generator=generator) * (seed != 1)
    emulator.glam_emulator_start_counting()
    gates, experts, positions, aux = glam.top2_gating(logits.requires_grad_(), None, None, 20, 4)
    plan = glam.routing_plan(experts, positions, 6)
    y = glam.moe_mlp(x + glam.embedding(ids, table), gates, *plan, *weights, None, "gelu")
    y = glam.combine(glam.dispatch(glam.rms_norm(y, torch.ones(8)), *plan), gates, *plan)
    loss, _, _ = glam.linear_cross_entropy(y, table, ids, None)
    (loss + aux.sum()).backward()
    return [(l["kernel"], l["grid"], l["block"]) for l in json.loads(emulator.glam_emulator_report())["launches"]]

print(json.dumps([launches(seed) for seed in (0, 1, 2)]))
"""


def test_launches_depend_on_shapes_alone(library: Path) -> None:
    """What a CUDA graph needs: the same kernels with the same grids whatever the routing, also all to one expert."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES, str(library)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *others = json.loads(done.stdout.splitlines()[-1])
    assert len(first) > 20
    for other in others:
        assert other == first
