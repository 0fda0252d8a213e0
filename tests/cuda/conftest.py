"""The emulated kernels with their glue, for the tests that run ops over them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .emulated import CUDA_INCLUDE, ROOT, compiler


@pytest.fixture(scope="session")
def library() -> Path:
    """csrc/cuda/emulator's library, built once."""
    compiler()  # skips where there is none
    build = ROOT / "build" / "cuda-emulated"
    configure = ["cmake", "-S", str(ROOT / "csrc/cuda/emulator"), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", f"-DCUDA_INCLUDE_DIR={CUDA_INCLUDE}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same run may want it too
        for command in (configure, ["cmake", "--build", str(build), "--parallel", jobs]):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return build / "libglam_cuda_emulated.so"
