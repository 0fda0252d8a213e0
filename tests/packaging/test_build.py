"""What was built: dependencies and symbols of the libraries, instruction sets, threads, includes of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glam_ext

ROOT = Path(__file__).parents[2]
PACKAGE = Path(glam_ext.__file__).parent
CORE = PACKAGE / "lib" / "libglam_core.so"
KERNEL_OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles"


def output_of(*command: str | Path) -> str:
    program = shutil.which(command[0])
    if program is None:
        pytest.skip(f"the program {command[0]} (binutils) is not installed")
    return subprocess.run([program, *command[1:]], check=True, capture_output=True, text=True).stdout


def in_fresh_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, cwd=ROOT
    )


def test_core_needs_torch_and_no_python() -> None:
    needed = re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", CORE))
    assert {"libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if "python" in name]


def test_core_has_no_undefined_python_symbol() -> None:
    undefined = output_of("nm", "-D", "--undefined-only", CORE).split()
    assert "U" in undefined, "nm listed nothing, so the test would prove nothing"
    assert not [name for name in undefined if re.match(r"_?Py[A-Z_]", name)]


def test_parallel_for_starts_workers_in_our_library() -> None:
    """Without -fopenmp at::parallel_for compiles to a plain loop; num_threads would still say 3."""
    code = (
        "import torch, glam_ext; torch.set_num_threads(3); i = glam_ext.build_info(); "
        "print(i['num_threads'], i['openmp'], i['parallel_workers'])"
    )
    assert in_fresh_python(code).stdout.split() == ["3", "True", "3"]


def test_build_info_names_versions_backends_and_reasons() -> None:
    info = glam_ext.build_info()
    assert info["version"] == glam_ext.__version__
    assert info["torch_running"] == torch.__version__
    assert info["torch_built"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["cxx_standard"] == 20
    cpu, cuda = info["backends"]["cpu"], info["backends"]["cuda"]
    assert cpu["isa_compiled"][0] == cpu["isa_supported"][0] == "baseline"
    assert cpu["isa_active"] in cpu["isa_compiled"]
    assert cuda["built"] or cuda["reason"]


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    cpu = glam_ext.build_info()["backends"]["cpu"]
    code = "import glam_ext; print(glam_ext.build_info()['backends']['cpu']['isa_active'])"
    result = in_fresh_python(code, GLAM_CPU_ISA=isa)
    if isa in cpu["isa_compiled"] and isa in cpu["isa_supported"]:
        assert result.stdout.strip() == isa
    else:
        assert "expected GLAM_CPU_ISA to name an instruction set that this build" in result.stderr


def test_unknown_instruction_set_is_refused() -> None:
    result = in_fresh_python("import glam_ext; glam_ext.build_info()", GLAM_CPU_ISA="sse9")
    assert "glam: expected GLAM_CPU_ISA to be baseline, avx2, avx512, avx512bf16 or amx, got sse9" in result.stderr


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_wide_kernels_share_no_symbol_with_other_objects(isa: str) -> None:
    """Of an inline function that several objects define the linker keeps one copy, for all instruction sets.

    If that is the wide one (say, of std::max or of a torch helper), it crashes on a narrower CPU. So whatever a wide
    object offers to the linker must carry the set's own namespace in its name.
    """
    objects = sorted((KERNEL_OBJECTS / f"glam_kernels_{isa}.dir").rglob("*.o"))
    if not objects:
        pytest.skip(f"no object files of the {isa} kernels in build/cmake: not a build in place, or not x86-64")
    for path in objects:
        symbols = output_of("nm", "--defined-only", "--extern-only", "--demangle", path).splitlines()
        assert symbols, f"{path.name} defines nothing"
        foreign = [line for line in symbols if f"glam::cpu::{isa}::" not in line]
        assert not foreign, f"{path.name} compiled for {isa} defines symbols outside glam::cpu::{isa}"


SOURCES = (".cpp", ".h", ".cu", ".cuh")


def includes(folder: str) -> list[tuple[Path, str]]:
    """(file, included header) of every C++ source below csrc/folder."""
    files = [path for path in sorted((ROOT / "csrc" / folder).rglob("*")) if path.suffix in SOURCES]
    assert files, f"no source in csrc/{folder}"
    return [(path, name) for path in files for name in re.findall(r'^#include [<"](.*)[>"]', path.read_text(), re.M)]


def test_op_files_include_light_headers_only() -> None:
    """torch/extension.h and torch/torch.h cost 10 to 16 s per file; an op needs neither."""
    heavy = {"torch/extension.h", "torch/torch.h", "torch/all.h", "ATen/ATen.h", "torch/script.h"}
    assert not [(path.name, name) for folder in ("ops", "cpu") for path, name in includes(folder) if name in heavy]


def test_kernel_files_include_no_torch_header() -> None:
    prefixes = ("torch/", "ATen/", "c10/")
    kernels = [*includes("cpu/kernels"), *includes("cuda/kernels"), *includes("cuda/emulator")]
    assert not [(path.name, name) for path, name in kernels if name.startswith(prefixes)]


@pytest.mark.parametrize(("folder", "others"), [("cpu", ("cuda/",)), ("cuda", ("cpu/",)), ("ops", ("cpu/", "cuda/"))])
def test_kinds_of_kernels_do_not_know_each_other_and_ops_know_none(folder: str, others: tuple[str, ...]) -> None:
    allowed = {"cpu/isa.h"}  # what build_info says of the CPU
    assert not [(p.name, n) for p, n in includes(folder) if n.startswith(others) and n not in allowed]


def test_installed_headers_stand_alone() -> None:
    """A program that has the installed package has torch's headers and ours, not the headers we were built with."""
    allowed = ("glam/", "torch/", "ATen/", "c10/")
    found = [(p.name, n) for p, n in includes("include/glam") if "/" in n and not n.startswith(allowed)]
    assert not found
