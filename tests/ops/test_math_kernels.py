"""The kernels' own exp, tanh and log: largest error over all floats, and the same bits in and out of vectors."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import glam_ext

ROOT = Path(__file__).parents[2]
# As cmake/GlamKernels.cmake compiles the kernels.
COMMON = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
BOUNDS = {"exp": 1.0, "tanh": 2.0, "log": 1.0}


@pytest.mark.parametrize("isa", FLAGS)
def test_errors_and_bits(isa: str, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    if isa not in glam_ext.build_info()["backends"]["cpu"]["isa_supported"]:
        pytest.skip(f"this CPU has no {isa}")
    program = tmp_path / "math_kernels"
    source = ROOT / "tests" / "cpp" / "math_kernels.cpp"
    command = [
        compiler,
        *COMMON,
        *FLAGS[isa],
        f"-DGLAM_ISA={isa}",
        f"-I{ROOT / 'csrc'}",
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    lines = subprocess.run([str(program), "1009"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(BOUNDS)
    for line in lines:
        name, error, mismatches = line.split()
        assert float(error) <= BOUNDS[name], f"{name} is off by {error} units in the last place"
        assert mismatches == "0", f"{name} differs between a vectorised loop and a single call"
