"""The product core under sanitizers: every format, and those of AMX and AVX-512-BF16 with emulated instructions.

The last two are what other CPUs can verify of them.
"""

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


# Errors are relative to the sum of the magnitudes. AMX rounds a sum once in 16 pairs, the others once or twice in each.
@pytest.mark.parametrize(
    ("defines", "bound"),
    [
        (["GLAM_FORMAT=FullPrecision<double>"], 1e-15),
        (["GLAM_FORMAT=FullPrecision<float>"], 4e-7),
        (["GLAM_FORMAT=Bf16Precision"], 4e-7),
        (["GLAM_FORMAT=Bf16Precision", "GLAM_EMULATE_AVX512BF16"], 4e-7),
        (["GLAM_FORMAT=Bf16Precision", "GLAM_EMULATE_AMX"], 2e-7),
    ],
    ids=["double", "float", "bf16", "bf16-avx512bf16", "bf16-amx"],
)
def test_products(defines: list[str], bound: float, tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    has_avx2 = "avx2" in glam_ext.build_info()["backends"]["cpu"]["isa_supported"]
    vectors = ["-mavx2", "-mfma", "-mf16c"] if has_avx2 else []
    program = tmp_path / "product_core"
    source = ROOT / "tests" / "cpp" / "product_core.cpp"
    command = [compiler, *FLAGS, *SANITIZERS, *vectors, "-DGLAM_ISA=tested", *(f"-D{name}" for name in defines)]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert float(result.stdout) < bound
