"""Every instruction set that this build and this CPU have gives what the references say, not only the widest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import glam_ext

CPU = glam_ext.build_info()["backends"]["cpu"]
SETS = CPU["isa_compiled"]
OPS = ["combine", "dispatch", "embedding", "expert_mlp", "geglu_mlp", "linear", "linear_cross_entropy", "moe_mlp",
       "relative_attention", "relative_attention_step", "rms_norm", "few_rows", "tile_edges"]  # fmt: skip
LEVELS = "test_reference or test_gradients or test_batch_invariance or tile_edges"


@pytest.mark.parametrize("isa", SETS)
def test_references(isa: str) -> None:
    if isa == CPU["isa_active"]:
        pytest.skip(f"{isa} is in use: every other test runs it")
    if isa not in CPU["isa_supported"]:
        pytest.skip(f"this CPU has no {isa}")
    folder = Path(__file__).parent
    files = [str(folder / f"test_{op}.py") for op in OPS]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", LEVELS, *files]
    environment = {**os.environ, "GLAM_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, cwd=folder.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
