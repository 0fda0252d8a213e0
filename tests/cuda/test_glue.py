"""The glue between torch and the CUDA kernels, without a GPU: it has a kernel for every op."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .emulated import ROOT

REGISTRATIONS = """
import json, re, sys
import torch, glam_ext

def files():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("glam::")]
    found = {name: re.search(r"^CPU: registered at (.*):", torch._C._dispatch_dump(name), re.M) for name in names}
    return {name: line[1] for name, line in found.items() if line}

before = files()
torch.ops.load_library(sys.argv[1])
print(json.dumps([before, files()]))
"""


def test_every_kernel_of_the_cpu_has_one_of_cuda(library: Path) -> None:
    """Where one is forgotten, the CPU's would answer in the tests of the emulated ops."""
    command = [sys.executable, "-c", REGISTRATIONS, str(library)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    cpu, emulated = json.loads(done.stdout.splitlines()[-1])
    assert len(cpu) > 30
    assert emulated.keys() == cpu.keys()
    assert [name for name, file in cpu.items() if "csrc/cpu/" not in file] == []
    assert [name for name, file in emulated.items() if "csrc/cuda/" not in file] == []
