"""What a CUDA graph needs of every op: launches, allocations and outputs that depend on shapes alone, whatever the
routing and the numbers, and no value that the host waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ops import samples

from . import launches
from .emulated import ROOT

# Their launches are the library's, or they only hand on what another rank sent.
WITHOUT_KERNELS = ("linear", "linear_wide", "router_logits", "exchange")


@pytest.fixture(scope="module")
def recorded(library: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """By op and sample, one record for each of launches.VARIANTS; forward and backward."""
    command = [sys.executable, "-m", "tests.cuda.launches", str(library), *launches.OPS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", launches.OPS)
def test_shapes_alone_decide(recorded: dict[str, dict[str, list[dict[str, Any]]]], op: str) -> None:
    assert recorded[op]
    for title, (first, *others) in recorded[op].items():
        for variant, other in zip(launches.VARIANTS[1:], others, strict=True):
            assert other == first, f"{title}: values {variant}"
        assert first["host reads"] == [], title
    assert any(first["launches"] for first, *_ in recorded[op].values()) == (op not in WITHOUT_KERNELS)


def test_every_op_with_a_kernel_is_called() -> None:
    """Directly, or as the forward or backward of one that is."""
    without_samples = {"exchange_counts", "ordered_all_reduce", "pack_weight", "unpack_weight", "to_compute_dtype"}
    assert set(launches.OPS) >= {op.name for op in samples.OPS}
    names = {name.removeprefix("glam::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("glam::")}
    assert {name for name in names if not name.startswith("_")} - set(launches.OPS) == without_samples


def test_a_read_by_the_host_is_noticed() -> None:
    _, events = launches.profiled(lambda: torch.ops.glam.ordered_sum(torch.ones(3)).item())
    assert "aten::_local_scalar_dense" in launches.host_reads(events)
    assert any(event.name() == "[memory]" for event in events)
