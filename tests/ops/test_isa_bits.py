"""AVX2, AVX-512 and AVX-512-BF16 give the same bits in products: all are one chain of multiply-adds per element."""

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
        x, w = (torch.randn(*size).to(dtype).requires_grad_() for size in ((rows, 301), (301, 67)))
        y = torch.ops.glam.linear_wide(x, w)
        torch.ops.glam.linear(x, w).backward(torch.randn(rows, 67).to(dtype))
        for values in (y, x.grad, w.grad):  # the gradients pack transposed operands
            digest.update(values.detach().double().numpy().tobytes())
print(digest.hexdigest())
"""


def digest(isa: str) -> str:
    command = [sys.executable, "-c", PROGRAM]
    environment = {**os.environ, "GLAM_CPU_ISA": isa}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("isa", ["avx512", "avx512bf16"])
def test_products(isa: str) -> None:
    if not {"avx2", isa} <= SUPPORTED:
        pytest.skip(f"this CPU or build has not both avx2 and {isa}")
    assert digest("avx2") == digest(isa)
