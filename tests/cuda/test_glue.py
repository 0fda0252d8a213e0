"""The glue between torch and the CUDA kernels, without a GPU: it has a kernel for every op, and compiles for CUDA
tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from .emulated import CUDA_INCLUDE, ROOT, compiler

GLUE = sorted((ROOT / "csrc/cuda").glob("*.cpp"))
# A header that only a CUDA build of torch has; the other ones of c10/cuda come with every build.
MISSING_HEADER = "c10/cuda/impl/cuda_cmake_macros.h"

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


@pytest.mark.slow
@pytest.mark.parametrize("source", GLUE, ids=lambda path: path.stem)
def test_compiles_for_cuda_tensors(source: Path, tmp_path: Path) -> None:
    """Without GLAM_EMULATE, also against the headers of a torch that has no CUDA."""
    command = [*compiler(), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DUSE_DISTRIBUTED"]
    command += [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc'}"]
    if torch.version.cuda is None:
        stub = tmp_path / MISSING_HEADER
        stub.parent.mkdir(parents=True)
        stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
        command.append(f"-isystem{tmp_path}")
    command += [f"-isystem{folder}" for folder in (*include_paths(), CUDA_INCLUDE)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
