"""All kernels under the sanitizers, without torch: no race, no access out of bounds, and the same bits in every order
of threads (kernels_program.cpp). That the values are right is for test_emulated_ops.py."""

from __future__ import annotations

import os
import subprocess

import pytest

from .emulated import ROOT, Builder

KERNELS = [str(path) for path in sorted((ROOT / "csrc/cuda/kernels").glob("*.cu"))]
FEWEST_CASES = 50


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address", marks=pytest.mark.slow)])
def test_kernels(builder: Builder, sanitizer: str) -> None:
    program = builder.program("kernels", sanitizer, KERNELS, ["kernels_program.cpp"])
    options = {
        "TSAN_OPTIONS": "exitcode=66 report_signal_unsafe=0 halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, **options})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) >= FEWEST_CASES
    assert [line for line in lines if not line.endswith(" ok")] == []
