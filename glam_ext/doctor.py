"""What this installation is and whether it works here: glam_ext.build_info() and the command `glam doctor`."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from typing import Any

import torch

from glam_ext import _C


def build_info() -> dict[str, Any]:
    """Facts of the build and of this process.

    Keys: version, torch_built, torch_running, python, compiler, cxx_standard (20), backends ({"cpu": {"built": True,
    "isa_compiled": [...], "isa_supported": [...], "isa_active": "avx2"}, "cuda": {"built": False, "reason": "...",
    "architectures": []}}), num_threads, openmp, parallel_workers (threads that took part in a small parallel loop of
    the core). Raises RuntimeError if GLAM_CPU_ISA asks for an instruction set that is not available.
    """
    core = _C.build_info()
    return {
        "version": core["version"],
        "torch_built": core["torch_version"],
        "torch_running": torch.__version__,
        "python": platform.python_version(),
        "compiler": core["compiler"],
        "cxx_standard": core["cxx_standard"] // 100 % 100,
        "backends": {
            "cpu": {
                "built": True,
                "isa_compiled": core["isa_compiled"],
                "isa_supported": core["isa_supported"],
                "isa_active": core["isa_active"],
            },
            "cuda": {
                "built": core["cuda"],
                "reason": core["cuda_reason"],
                "architectures": core["cuda_architectures"],
            },
        },
        "num_threads": core["num_threads"],
        "openmp": core["openmp"],
        "parallel_workers": core["parallel_workers"],
    }


def _check_parallel() -> str:
    info = build_info()
    if info["parallel_workers"] != info["num_threads"]:
        raise RuntimeError(
            f"expected a parallel loop of the core to use {info['num_threads']} threads, "
            f"got {info['parallel_workers']}; is OMP_THREAD_LIMIT set, or was the core built without OpenMP?"
        )
    return f"a parallel loop of the core uses {info['parallel_workers']} threads"


def _check_isa() -> str:
    cpu = build_info()["backends"]["cpu"]
    usable = [isa for isa in cpu["isa_compiled"] if isa in cpu["isa_supported"]]
    if cpu["isa_active"] != usable[-1]:
        raise RuntimeError(
            f"GLAM_CPU_ISA holds the kernels back to {cpu['isa_active']}; this CPU could use {usable[-1]}"
        )
    return f"the kernels use {cpu['isa_active']}, the widest set that the build and this CPU share"


def _check_ops() -> str:
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("glam::")]
    if not names:
        raise RuntimeError("expected ops in the namespace glam, found none; reinstall the package")
    return f"{len(names)} ops are registered in the namespace glam"


CHECKS: dict[str, Callable[[], str]] = {"ops": _check_ops, "instruction set": _check_isa, "threads": _check_parallel}


def main(argv: list[str] | None = None) -> int:
    """Print the build's facts and run the checks; the exit status is 1 if one of them fails."""
    argparse.ArgumentParser(prog="glam doctor", description=main.__doc__).parse_args(argv)
    info = build_info()
    cpu, cuda = info["backends"]["cpu"], info["backends"]["cuda"]
    rows = {
        "glam_ext": info["version"],
        "torch": f"{info['torch_running']} (compiled against {info['torch_built']})",
        "python": info["python"],
        "compiler": f"{info['compiler']}, C++{info['cxx_standard']}",
        "cpu": f"kernels for {', '.join(cpu['isa_compiled'])}; this CPU has {', '.join(cpu['isa_supported'])}; "
        f"in use: {cpu['isa_active']}",
        "cuda": ", ".join(cuda["architectures"]) if cuda["built"] else f"not built: {cuda['reason']}",
        "threads": f"{info['num_threads']}, OpenMP {'on' if info['openmp'] else 'off'}",
    }
    for name, value in rows.items():
        print(f"{name:<10} {value}")
    failed = False
    for name, check in CHECKS.items():
        try:
            print(f"ok         {name}: {check()}")
        except RuntimeError as error:
            failed = True
            print(f"FAILED     {name}: {error}")
    return int(failed)
