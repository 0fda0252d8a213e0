"""The product core for AMX, with its tile registers emulated: what a CPU without AMX can verify of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import glam_ext

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def test_products(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    has_avx2 = "avx2" in glam_ext.build_info()["backends"]["cpu"]["isa_supported"]
    vectors = ["-mavx2", "-mfma", "-mf16c"] if has_avx2 else []
    program = tmp_path / "tile_registers"
    source = ROOT / "tests" / "cpp" / "tile_registers.cpp"
    command = [compiler, *FLAGS, *SANITIZERS, *vectors, "-DGLAM_ISA=emulated", "-DGLAM_EMULATE_AMX"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert float(result.stdout) < 2e-7  # of the sum of the products' magnitudes
