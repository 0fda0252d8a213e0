"""The kernels' own exp, tanh and log: largest error over all floats, and the same bits in and out of vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

import glam_ext

from .kernel_program import FLAGS, run_kernel_program

BOUNDS = {"exp": 1.0, "vector_exp": 1.0, "tanh": 2.0, "log": 1.0}


@pytest.mark.parametrize("isa", FLAGS)
def test_errors_and_bits(isa: str, tmp_path: Path) -> None:
    if isa not in glam_ext.build_info()["backends"]["cpu"]["isa_supported"]:
        pytest.skip(f"this CPU has no {isa}")
    flags = ["-O3", *FLAGS[isa], f"-DGLAM_ISA={isa}"]
    lines = run_kernel_program(tmp_path, "math_kernels", flags, ["1009"]).splitlines()
    assert [line.split()[0] for line in lines] == list(BOUNDS)
    for line in lines:
        name, error, mismatches = line.split()
        assert float(error) <= BOUNDS[name], f"{name} is off by {error} units in the last place"
        assert mismatches == "0", f"{name} differs between vectors and a single call"
