"""What every CUDA kernel takes of a multiprocessor, as nvcc and the launches say: no GPU is needed.

    python benchmarks/gpu_resources.py build/cuda-emulated/libglam_cuda_emulated.so [--architecture 90a]
        [--markdown | --write]

One line per kernel. "registers": of a thread, least to most over the kernel's instantiations. "as launched":
those of the instantiation that the ops of gpu_traffic.py launch for bfloat16 activations and float32 weights with
D = 2,048 and E = 64; of several, the one that takes most. "block" and "shared": the threads and the bytes of shared
memory that this launch asks for; static shared memory there is none. "occupancy": the warps of the blocks that a
multiprocessor holds at once over the most that it can hold, and what it runs out of first, as NVIDIA's cuda_occupancy.h
computes it. A kernel that these ops do not launch has no block, so no occupancy. Spills do not appear here: the build
refuses them.

--write puts the table, which the version of nvcc decides, into docs/cuda.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gpu_traffic
from generated import replace_part, table

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc/cuda/kernels").glob("*.cu"))
SIZES = gpu_traffic.Sizes(T=128, D=2048, E=64, F=32, V=64, B=1, S=64, H=2, A=128, matrix=64)
WARP = 32


@dataclass(frozen=True)
class Multiprocessor:
    """From the CUDA programming guide, "Technical Specifications per Compute Capability"."""

    shared: int  # bytes, of which a block takes RESERVED more than it asks for
    registers: int = 65536
    warps: int = 64
    blocks: int = 32


MULTIPROCESSORS = {
    "80": Multiprocessor(shared=164 * 1024),
    "90a": Multiprocessor(shared=228 * 1024),
    "100": Multiprocessor(shared=228 * 1024),
}
RESERVED = 1024  # bytes of shared memory that the system takes of every block
PARTITIONS = 4  # of a multiprocessor, each with a fourth of the registers
REGISTER_UNIT = 256  # registers are given to warps in units of this many, bytes of shared memory to blocks in those:
SHARED_UNIT = 128


def round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


def occupancy(architecture: str, registers: int, threads: int, shared: int) -> tuple[float, str]:
    """The share of its warps that a multiprocessor holds of a kernel, and what keeps it from holding more."""
    machine = MULTIPROCESSORS[architecture]
    warps = round_up(threads, WARP) // WARP
    warps_of_registers = machine.registers // PARTITIONS // round_up(registers * WARP, REGISTER_UNIT) * PARTITIONS
    blocks = {
        "warps": machine.warps // warps,
        "blocks": machine.blocks,
        "registers": warps_of_registers // warps,
        "shared memory": machine.shared // round_up(shared + RESERVED, SHARED_UNIT),
    }
    limit = min(blocks, key=lambda name: blocks[name])
    return blocks[limit] * warps / machine.warps, limit


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def shortened(name: str) -> str:
    """A demangled kernel as the emulator writes it: "void glam::cuda::(anonymous namespace)::k<float, a::B>(...)" is
    "k<float, B>"."""
    name = name.replace("(anonymous namespace)::", "")
    name = re.sub(r"\((?:bool|int)\)", "", name)  # of a template argument
    return re.sub(r"\w+::", "", name.split("(")[0]).removeprefix("void ")


def report(source: Path, architecture: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of static shared memory of every instantiation, by its short name."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc() or "nvcc", "-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Xptxas=-v"]
        command += [f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{architecture},code=sm_{architecture}"]
        command += ["-c", str(source), "-o", f"{folder}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"entry function '(.*?)' for.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?", names, re.S)
    return {shortened(name): (int(registers), int(shared or 0)) for name, registers, shared in found}


def version() -> str:
    """nvcc's, on which registers depend: "13.0"."""
    text = subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found is not None
    return found[1]


def launches(library: str) -> dict[str, tuple[int, int]]:
    """Threads of a block and bytes of shared memory of every instantiation that the ops launch."""
    emulator = gpu_traffic.Emulator(library)
    found = {}
    for call, _ in gpu_traffic.cases(SIZES).values():
        for launch in emulator.report(call)["launches"]:
            x, y, z = launch["block"]
            found[launch["kernel"]] = (x * y * z, launch["shared_bytes"])
    return found


def rows(library: str, architecture: str) -> list[list[str]]:
    launched = launches(library)
    with ThreadPoolExecutor(max_workers=2) as pool:
        reports = list(pool.map(lambda source: report(source, architecture), KERNELS))
    lines = [["file", "kernel", "instantiations", "registers", "as launched", "block", "shared", "occupancy"]]
    for source, found in zip(KERNELS, reports, strict=True):
        kernels = defaultdict(list)
        for name in found:
            kernels[name.split("<")[0]].append(name)
        for kernel, names in sorted(kernels.items()):
            assert all(found[name][1] == 0 for name in names), f"{kernel} has static shared memory"
            registers = sorted(found[name][0] for name in names)
            span = f"{registers[0]} to {registers[-1]}" if registers[0] < registers[-1] else str(registers[0])
            line = [source.stem, kernel, str(len(names)), span]
            if used := [name for name in names if name in launched]:
                name = max(used, key=lambda name: found[name][0])
                share, limit = occupancy(architecture, found[name][0], *launched[name])
                threads, shared = launched[name]
                arguments = name.removeprefix(kernel).replace("__nv_", "")[1:-1].strip()
                used_registers = f"{found[name][0]} (`{arguments}`)" if arguments else str(found[name][0])
                held = f"{share:.0%}" if share == 1 else f"{share:.0%}, {limit}"
                line += [used_registers, str(threads), str(shared), held]
            else:
                line += ["", "", "", ""]
            lines.append(line)
    return lines


def part(library: str, architecture: str = "90a") -> str:
    """What stands in docs/cuda.md."""
    dotted = re.sub(r"(\d)(a?)$", r".\1\2", architecture)
    return f"For {dotted}, by nvcc {version()}:\n\n" + table(rows(library, architecture), markdown=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="the emulated kernels (csrc/cuda/emulator)")
    parser.add_argument("--architecture", default="90a", choices=list(MULTIPROCESSORS))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write:
        replace_part("resources", part(options.library))
    else:
        print(table(rows(options.library, options.architecture), options.markdown))


if __name__ == "__main__":
    main()
