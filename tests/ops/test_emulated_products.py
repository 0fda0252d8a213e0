"""The bfloat16 product core for AMX and AVX-512-BF16 with emulated instructions: what other CPUs can verify of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import glam_ext

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O1", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


# Errors are relative to the sum of the magnitudes; AMX rounds a sum once in 16 pairs, the other twice in each.
@pytest.mark.parametrize(("emulation", "bound"), [("GLAM_EMULATE_AMX", 2e-7), ("GLAM_EMULATE_AVX512BF16", 4e-7)])
def test_products(emulation: str, bound: float, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    has_avx2 = "avx2" in glam_ext.build_info()["backends"]["cpu"]["isa_supported"]
    vectors = ["-mavx2", "-mfma", "-mf16c"] if has_avx2 else []
    program = tmp_path / "bf16_products"
    source = ROOT / "tests" / "cpp" / "bf16_products.cpp"
    command = [compiler, *FLAGS, *SANITIZERS, *vectors, "-DGLAM_ISA=emulated", f"-D{emulation}"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert float(result.stdout) < bound
