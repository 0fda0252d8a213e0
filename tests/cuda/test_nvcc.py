"""nvcc compiles every kernel for every architecture, with spilled registers and local memory as errors.

Where the disassembler is at hand, the machine code is read too: copies of rows must be 16 bytes wide.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .emulated import ROOT

KERNELS = sorted((ROOT / "csrc/cuda/kernels").glob("*.cu"))
ARCHITECTURES = ["80", "90a", "100"]
OPTIONS = re.search(r"GLAM_NVCC_OPTIONS (.*?)\)", (ROOT / "cmake/GlamCuda.cmake").read_text(), re.S)


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if found is None:
        pytest.skip("there is no nvcc here")
    return found


def compile_kernels(source: Path, architecture: str, target: Path) -> str:
    """The object file; returns what ptxas says of its kernels."""
    assert OPTIONS is not None
    command = [nvcc(), "-std=c++20", "-O3", "-DNDEBUG", *OPTIONS[1].split(), "-Xptxas=-v", f"-I{ROOT / 'csrc'}"]
    command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, architecture: str, tmp_path: Path) -> None:
    messages = compile_kernels(source, architecture, tmp_path / "kernels.o")
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", messages)
    assert spilled
    assert set(spilled) == {("0", "0")}


def test_a_kernel_with_local_memory_is_refused(tmp_path: Path) -> None:
    """The options do what the tests above rely on."""
    assert OPTIONS is not None
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void kernel(float* x, int i) { float a[64] = {}; "
        "for (int k = 0; k < 64; ++k) a[k * i & 63] += x[k]; for (int k = 0; k < 64; ++k) x[k] = a[k]; }"
    )
    command = [nvcc(), "-O3", *OPTIONS[1].split(), "-gencode=arch=compute_90a,code=sm_90a", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "spills.o")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Local memory used" in done.stderr
