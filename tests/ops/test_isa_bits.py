"""AVX2 and AVX-512 give the same bits in products: both are one chain of fused multiply-adds per element."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import glam_ext

SUPPORTED = set(glam_ext.build_info()["backends"]["cpu"]["isa_supported"])
PROGRAM = """
import hashlib, torch, glam_ext
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    for rows in (1, 15, 113):
        x, w = torch.randn(rows, 301).to(dtype), torch.randn(301, 67).to(dtype)
        digest.update(torch.ops.glam.linear_wide(x, w).numpy().tobytes())
print(digest.hexdigest())
"""


def digest(isa: str) -> str:
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "GLAM_CPU_ISA": isa}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(not {"avx2", "avx512"} <= SUPPORTED, reason="this CPU or build has not both AVX2 and AVX-512")
def test_products() -> None:
    assert digest("avx2") == digest("avx512")
