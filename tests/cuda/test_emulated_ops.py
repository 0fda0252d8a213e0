"""The ops' own tests over the emulated CUDA kernels: the kernels' sources and the glue that a GPU build has, behind the
CPU's dispatch key in a process of their own.

Left out are levels that cannot differ (compile, export, TorchScript and the refusal of double backward go through Meta
and Autograd alone) and tests of what the CPU kernels alone promise: errors for indices out of range, packed weights,
bits that do not depend on threads.
"""

from __future__ import annotations

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
@pytest.mark.parametrize(("order", "seed"), [("forward", 2), ("reverse", 2), *(("random", seed) for seed in (2, 3))])
@pytest.mark.parametrize("op", [op for group in GROUPS.values() for op in group])
def test_op_in_every_order(library: Path, op: str, order: str, seed: int) -> None:
    run_emulated(library, [op], ALL, GLAM_EMULATOR_ORDER=order, GLAM_EMULATOR_SEED=str(seed))
