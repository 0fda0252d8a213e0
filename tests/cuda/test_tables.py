"""docs/cuda.md holds what the generators of its tables print, and the copies of rows keep to what it says of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .emulated import CUDA_INCLUDE, ROOT, compiler

BENCHMARKS = ROOT / "benchmarks"


def run(program: str, *arguments: str) -> Any:
    """What a program prints as JSON that sees the scripts of benchmarks/."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", f"import json, sys\n{program}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


TRAFFIC = """
import gpu_traffic as traffic
from generated import read_part, table
found = traffic.measured(traffic.Emulator(sys.argv[1]), traffic.Sizes())
numbers = {name: [x.touched, x.uncoalesced, x.bank_passes] for name, x in found.items()}
print(json.dumps([numbers, table(traffic.rows(found), markdown=True), read_part("traffic")]))
"""


@pytest.fixture(scope="module")
def traffic(library: Path) -> tuple[dict[str, list[Any]], str, str]:
    """By op touched over necessary bytes, the uncoalesced share and the bank passes; then the table and the page's."""
    numbers, table, page = run(TRAFFIC, str(library))
    return numbers, table, page


COPIES_OF_ROWS = ("dispatch", "dispatch backward", "combine", "combine backward", "embedding")


def test_copies_of_rows_move_what_they_must(traffic: tuple[dict[str, list[Any]], str, str]) -> None:
    for name in COPIES_OF_ROWS:
        touched, uncoalesced, _ = traffic[0][name]
        assert touched <= 1.1, name
        assert uncoalesced == 0, name


def test_shared_memory_has_no_bank_conflicts(traffic: tuple[dict[str, list[Any]], str, str]) -> None:
    counted = {name: passes for name, (_, _, passes) in traffic[0].items() if passes is not None}
    assert len(counted) > 15
    for name, passes in counted.items():
        assert passes == 1, name


@pytest.mark.slow
def test_the_table_of_traffic_is_up_to_date(traffic: tuple[dict[str, list[Any]], str, str]) -> None:
    _, table, page = traffic
    assert page == table, "run benchmarks/gpu_traffic.py --write"


RESOURCES = """
import gpu_resources as resources
from generated import read_part
page = read_part("resources")
here = resources.nvcc() and resources.version()
documented = here and f"nvcc {here}:" in page
print(json.dumps([here, page, resources.part(sys.argv[1]) if documented else None]))
"""


@pytest.mark.slow
def test_the_table_of_resources_is_up_to_date(library: Path) -> None:
    here, page, generated = run(RESOURCES, str(library))
    if here is None:
        pytest.skip("there is no nvcc here")
    if generated is None:
        pytest.skip(f"nvcc {here} is not the documented one, and gives other registers")
    assert page == generated, "run benchmarks/gpu_resources.py --write"
    assert "|  |" not in page, "a case of benchmarks/gpu_traffic.py is to launch every kernel"


OCCUPANCIES = """
import itertools
import gpu_resources as resources
cases = itertools.product(resources.MULTIPROCESSORS, (16, 33, 64, 72, 128), (32, 96, 256, 512), (0, 5000, 40960))
print(json.dumps([[*case, resources.occupancy(*case)[0] * 64] for case in cases]))
"""

CALCULATOR = """
#include <cuda_runtime.h>
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int major, registers, threads, shared;
  while (std::scanf("%d %d %d %d", &major, &registers, &threads, &shared) == 4) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = 0;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 2048;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerMultiprocessor = (major == 8 ? 164 : 228) * 1024;
    device.reservedSharedMemPerBlock = 1024;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - 1024;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor * ((threads + 31) / 32));
  }
}
"""


def test_occupancy_is_what_nvidia_computes(tmp_path: Path) -> None:
    command = compiler()
    if not (CUDA_INCLUDE / "cuda_occupancy.h").exists():
        pytest.skip(f"no cuda_occupancy.h in {CUDA_INCLUDE}")
    source = tmp_path / "occupancy.cpp"
    source.write_text(CALCULATOR)
    program = tmp_path / "occupancy"
    subprocess.run([*command, f"-isystem{CUDA_INCLUDE}", str(source), "-o", str(program)], check=True)
    cases = run(OCCUPANCIES)
    majors = {"80": 8, "90a": 9, "100": 10}
    text = "".join(f"{majors[case[0]]} {case[1]} {case[2]} {case[3]}\n" for case in cases)
    done = subprocess.run([str(program)], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for case, warps in zip(cases, done.stdout.split(), strict=True):
        assert case[4] == int(warps), case
