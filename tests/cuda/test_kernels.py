"""All kernels under the sanitizers, without torch: no race, no access out of bounds, and the same bits in every order
of threads (kernels_program.cpp). That the values are right is for test_emulated_ops.py.

The kernels of other types have the same barriers as those of float32, and a race is found in any order, so the fast
test is ThreadSanitizer over float32 in one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence

import pytest

from .emulated import ROOT, Builder

KERNELS = [str(path) for path in sorted((ROOT / "csrc/cuda/kernels").glob("*.cu"))]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("kernels"))


def check(builder: Builder, sanitizer: str, arguments: Sequence[str], fewest: int) -> None:
    program = builder.program("kernels", sanitizer, KERNELS, ["kernels_program.cpp"])
    options = {
        "TSAN_OPTIONS": "exitcode=66 report_signal_unsafe=0 halt_on_error=1",
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [*program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:6000]
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) >= fewest
    assert [line for line in lines if not line.endswith(" ok")] == []


def test_no_races(builder: Builder) -> None:
    check(builder, "thread", ["--once", "f32", "plans", "sampling", "geglu"], 16)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_every_type_in_every_order(builder: Builder, sanitizer: str) -> None:
    check(builder, sanitizer, [], 50)
