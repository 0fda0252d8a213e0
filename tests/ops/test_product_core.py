"""The product core under sanitizers: every format, and those of AMX and AVX-512-BF16 with emulated instructions.

The last two are what other CPUs can verify of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import glam_ext

from .kernel_program import FLAGS, run_kernel_program

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
    has_avx2 = "avx2" in glam_ext.build_info()["backends"]["cpu"]["isa_supported"]
    flags = ["-O1", "-Wno-psabi", *SANITIZERS, *FLAGS["avx2" if has_avx2 else "baseline"], "-DGLAM_ISA=tested"]
    assert float(run_kernel_program(tmp_path, "product_core", [*flags, *(f"-D{name}" for name in defines)])) < bound
