"""Attention's kernels under sanitizers, which see every access to the scratch that the ops reuse from call to call."""

from __future__ import annotations

from pathlib import Path

import pytest

from .kernel_program import NARROW, run_sanitized

BF16 = "GLAM_FORMAT=Bf16Precision"


@pytest.mark.parametrize(
    ("isa", "defines", "output_bound", "gradient_bound"),
    [
        (NARROW, ["GLAM_FORMAT=FullPrecision<double>"], 1e-14, 1e-14),
        (NARROW, ["GLAM_FORMAT=FullPrecision<float>"], 1e-6, 1e-5),
        (NARROW, [BF16], 5e-3, 1e-2),
        (NARROW, [BF16, "GLAM_EMULATE_AVX512BF16"], 5e-3, 1e-2),
        (NARROW, [BF16, "GLAM_EMULATE_AMX"], 5e-3, 1e-2),
        ("avx512bf16", [BF16], 5e-3, 1e-2),
        ("amx", [BF16], 5e-3, 1e-2),
    ],
    ids=["double", "float", "bf16", "bf16-emulated-avx512bf16", "bf16-emulated-amx", "bf16-avx512bf16", "bf16-amx"],
)
def test_attention(isa: str, defines: list[str], output_bound: float, gradient_bound: float, tmp_path: Path) -> None:
    output_error, gradient_error = map(float, run_sanitized(tmp_path, "attention_core", isa, defines).split())
    assert output_error < output_bound
    assert gradient_error < gradient_bound
