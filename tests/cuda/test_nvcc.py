"""nvcc compiles all kernels and all PTX instructions for every architecture, with spilled registers and local memory as
errors; the machine code of the row copies moves 16 bytes at a time."""

from __future__ import annotations

import importlib.util
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


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ptx_assembles(architecture: str, tmp_path: Path) -> None:
    """What asm statements say is only read by ptxas, and no kernel has to use all of them."""
    messages = compile_kernels(ROOT / "tests/cuda/ptx_probe.cu", architecture, tmp_path / "probe.o")
    assert len(re.findall(r"Compiling entry function", messages)) == 4  # copies, loads, products in two types


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


def disassembler() -> Path:
    """cuobjdump of the package nvidia-cuda-cuobjdump, which wants nvdisasm beside it."""
    package = importlib.util.find_spec("nvidia")
    for folder in [] if package is None else package.submodule_search_locations or []:
        for program in sorted(Path(folder).glob("*/bin/cuobjdump")):
            if program.with_name("nvdisasm").exists():
                return program
    pytest.skip("the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm are not installed")


@pytest.mark.slow
def test_rows_are_copied_sixteen_bytes_at_a_time(tmp_path: Path) -> None:
    program = disassembler()
    compile_kernels(ROOT / "csrc/cuda/kernels/routing.cu", "90a", tmp_path / "routing.o")
    path = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    dump = subprocess.run(
        [program, "-sass", tmp_path / "routing.o"], capture_output=True, text=True, check=True, env=path
    )
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dump.stdout, re.S))
    wide = [code for name, code in functions.items() if re.search(r"dispatch_rows.*Vector|combine_rows.*Li8E", name)]
    assert len(wide) > 4
    for code in wide:
        assert "LDG.E.128" in code
        assert "STG.E.128" in code
    assert not re.search(r"\b(LDL|STL)\b", dump.stdout)
