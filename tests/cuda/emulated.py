"""Builds C++ programs over the CUDA emulator with the host compiler, once for each sanitizer."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EMULATOR = ROOT / "csrc" / "cuda" / "emulator"
CUDA_INCLUDE = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
COMMON = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DGLAM_EMULATE"]
# Flags of the kernels, and what the emulator's own sources are told instead (see csrc/cuda/emulator/sanitizers.h).
SANITIZERS = {
    "plain": ([], []),
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
        ["-DGLAM_EMULATOR_ASAN"],
    ),
    "thread": (["-fsanitize=thread"], ["-DGLAM_EMULATOR_TSAN"]),
    "ucontext": ([], ["-DGLAM_EMULATOR_UCONTEXT"]),
}


@cache
def compiler() -> list[str]:
    """The host compiler, behind ccache if there is one; skips the test where something is missing."""
    if not (CUDA_INCLUDE / "cuda_bf16.h").exists():
        pytest.skip(f"no CUDA headers in {CUDA_INCLUDE} (set CUDA_HOME)")
    program = shutil.which(os.environ.get("CXX", "g++"))
    if program is None:
        pytest.skip("no C++ compiler")
    ccache = shutil.which("ccache")
    return [ccache, program] if ccache else [program]


@cache
def launcher(sanitizer: str) -> tuple[str, ...]:
    """What to put before a sanitized program's name. Skips where the sanitizer does not work here."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "probe"
        command = [compiler()[-1], "-xc++", "-", *SANITIZERS[sanitizer][0], "-o", str(program)]
        built = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
        if built.returncode:
            pytest.skip(f"the compiler lacks the {sanitizer} sanitizer: {built.stderr.strip()}")
        # ThreadSanitizer refuses some layouts of the address space; setarch turns their randomness off.
        for prefix in ((), ("setarch", platform.machine(), "-R")):
            if subprocess.run([*prefix, str(program)], capture_output=True).returncode == 0:
                return prefix
    pytest.skip(f"programs with the {sanitizer} sanitizer do not run here")


def compile_object(source: Path, target: Path, flags: Sequence[str]) -> Path:
    command = [*compiler(), *COMMON, f"-I{ROOT / 'csrc'}", f"-isystem{CUDA_INCLUDE}", *flags]
    command += ["-xc++", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


class Builder:
    """Objects and programs in one folder; what does not depend on the sanitizer is compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[str, Path] = {}

    def program(self, name: str, sanitizer: str, kernels: Sequence[str], hosts: Sequence[str]) -> list[str]:
        """The command that runs the program of tests/cuda's kernel and host sources."""
        prefix = launcher(sanitizer) if SANITIZERS[sanitizer][0] else ()
        kernel_flags, emulator_flags = SANITIZERS[sanitizer]
        jobs = []
        for source in sorted(EMULATOR.glob("*.cpp")):
            depends = emulator_flags and source.stem in ("fiber", "meetings", "reports", "scheduler")
            jobs.append((source, emulator_flags if depends else [], sanitizer if depends else "any"))
        kind = sanitizer if kernel_flags else "any"
        jobs += [(HERE / kernel, kernel_flags, kind) for kernel in kernels]
        jobs += [(HERE / host, [], "any") for host in hosts]
        missing = {}
        for source, flags, kind in jobs:
            key = f"{source.stem}-{kind}"
            if key not in self.objects:
                missing[key] = (source, self.folder / f"{key}.o", flags)
        with ThreadPoolExecutor(max_workers=2) as pool:
            for key, target in zip(missing, pool.map(lambda job: compile_object(*job), missing.values()), strict=True):
                self.objects[key] = target
        program = self.folder / f"{name}-{sanitizer}"
        objects = [str(self.objects[f"{source.stem}-{kind}"]) for source, _, kind in jobs]
        subprocess.run([*compiler(), *objects, *kernel_flags, "-o", str(program), "-ldl", "-pthread"], check=True)
        return [*prefix, str(program)]
