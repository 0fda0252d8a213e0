"""The product core under sanitizers: every format, and those of AMX and AVX-512-BF16 with emulated instructions.

The last two are what other CPUs can verify of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .kernel_program import NARROW, run_sanitized


def run(isa: str, defines: list[str], tmp_path: Path) -> tuple[float, str]:
    """The largest error, and a checksum of all results."""
    error, checksum = run_sanitized(tmp_path, "product_core", isa, defines).split()
    return float(error), checksum


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
    error, _ = run(NARROW, defines, tmp_path)
    assert error < bound


@pytest.mark.parametrize("isa", ["avx512bf16", "amx"])
def test_what_emulates_an_instruction_set_has_its_bits(isa: str, tmp_path: Path) -> None:
    emulated = ["GLAM_FORMAT=Bf16Precision", f"GLAM_EMULATE_{isa.upper()}"]
    assert run(isa, ["GLAM_FORMAT=Bf16Precision"], tmp_path) == run(NARROW, emulated, tmp_path)
