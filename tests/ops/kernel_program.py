"""Programs of tests/cpp that include the kernels' sources and link neither torch nor the package."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

import glam_ext

ROOT = Path(__file__).parents[2]
# As cmake/GlamKernels.cmake compiles the kernels, but for the optimisation.
COMMON = ["-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SUPPORTED = frozenset(glam_ext.build_info()["backends"]["cpu"]["isa_supported"])
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512cd", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
FLAGS["avx512bf16"] = [*FLAGS["avx512"], "-mavx512bf16", "-mavx512vbmi"]
FLAGS["amx"] = [*FLAGS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
# What emulates wider instructions, and formats that need none, are compiled for this.
NARROW = "avx2" if "avx2" in SUPPORTED else "baseline"


def run_kernel_program(folder: Path, name: str, flags: Sequence[str], arguments: Sequence[str] = ()) -> str:
    """What tests/cpp/NAME.cpp prints, compiled into the folder with these flags too."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, program = ROOT / "tests" / "cpp" / f"{name}.cpp", folder / name
    subprocess.run([compiler, *COMMON, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_sanitized(folder: Path, name: str, isa: str, defines: Sequence[str]) -> str:
    """The same with address and undefined behaviour sanitizers; skipped if the CPU has not this set."""
    if isa not in SUPPORTED:
        pytest.skip(f"this CPU has no {isa}")
    flags = ["-O1", "-Wno-psabi", *SANITIZERS, *FLAGS[isa], "-DGLAM_ISA=tested"]
    return run_kernel_program(folder, name, [*flags, *(f"-D{define}" for define in defines)])
