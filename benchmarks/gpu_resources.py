"""What every CUDA kernel takes of a multiprocessor, as nvcc reports it: no GPU is needed.

    python benchmarks/gpu_resources.py [--architectures 80 90a 100]

One line per kernel and architecture: its instantiations, their registers (least to most), bytes of static shared
memory, and how many of the 64 warps of a multiprocessor its registers admit (65,536 of them, given out in eights per
thread). Shared memory that a launch asks for, and the size of its blocks, can lower that further. Spills do not appear
here: the build refuses them. --markdown prints the table of docs/cuda.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "csrc/cuda/kernels").glob("*.cu"))
REGISTERS, WARP, MOST_WARPS = 65536, 32, 64


def report(source: Path, architecture: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, static shared bytes) of every instantiation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            "-std=c++20",
            "-O3",
            "-DNDEBUG",
            "--expt-relaxed-constexpr",
            "-Xptxas=-v",
            f"-I{ROOT / 'csrc'}",
        ]
        command += [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-c", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/kernels.o"], capture_output=True, text=True, check=True)
    names = subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"entry function '(.*?)' for.*?Used (\d+) registers(?:.*?(\d+) bytes smem)?", names, re.S)
    short = re.compile(r"namespace\)::(\w+)")
    return [(short.findall(name)[0], int(registers), int(shared or 0)) for name, registers, shared in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["80", "90a", "100"])
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    jobs = [(source, architecture) for source in KERNELS for architecture in options.architectures]
    with ThreadPoolExecutor(max_workers=2) as pool:
        results = list(pool.map(lambda job: report(*job), jobs))
    left, between, right = ("| ", " | ", " |") if options.markdown else ("", "  ", "")
    print(left + between.join(("file", "kernel", "sm", "instantiations", "registers", "static smem", "warps")) + right)
    if options.markdown:
        print("|" + "---|" * 7)
    for (source, architecture), found in zip(jobs, results, strict=True):
        kernels = defaultdict(list)
        for name, registers, shared in found:
            kernels[name].append((registers, shared))
        for name, uses in sorted(kernels.items()):
            most = max(registers for registers, _ in uses)
            warps = min(MOST_WARPS, REGISTERS // (-(-most // 8) * 8 * WARP))
            registers = f"{min(r for r, _ in uses)} to {most}" if len(uses) > 1 else str(most)
            cells = (source.stem, name, architecture, len(uses), registers, max(s for _, s in uses), warps)
            print(left + between.join(map(str, cells)) + right)


if __name__ == "__main__":
    main()
