"""The CUDA emulator itself: it finds what is planted in small kernels and is silent on the right ones, in every order
of threads and under every sanitizer.

The cheap layer is order and poison: a missing barrier gives a wrong result in some order. The sure one is
ThreadSanitizer, which sees a missing barrier in any order, and races between blocks, which run one after another here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from .emulated import HERE, Builder

KERNELS = ["planted_kernels.cu", "misuse_kernels.cu", "function_kernels.cu"]
RIGHT = ["row", "sort", "product", "count", "total"]
FUNCTIONS = ["indices", "shuffles", "votes", "masks", "atomics", "scalars", "poison"]
ORDERS = ["forward", "reverse", "random"]
# For each bug the orders in which its result must be wrong, and in how many of 20 random ones. Those that stay right in
# an order are ThreadSanitizer's to find.
WRONG = {
    "row_without_barrier": (["forward", "reverse"], 20),
    "sort_without_zeroing": (["forward", "reverse"], 20),
    "sort_without_histogram": (["forward", "reverse"], 20),
    "sort_without_scan": (["forward"], 15),
    "sort_without_warp_barrier": (["forward", "reverse"], 20),
    "product_without_wait": (["forward"], 20),
    "product_overwrites_stage": (["reverse"], 0),
    "count_without_atomic": ([], 0),
    "total_without_fence": ([], 0),
}
# A copy that nobody waits for is no race between threads.
RACES = [bug for bug in WRONG if bug != "product_without_wait"]
MISUSES = re.findall(r'\{"(\w+)", \[\]\(Arrays', (HERE / "misuse_kernels.cu").read_text())


class Result(NamedTuple):
    case: str
    order: str
    seed: int
    text: str  # ok, wrong or error and its message


class Output(NamedTuple):
    code: int
    results: list[Result]
    errors: str


def run(command: Sequence[str], *cases: str) -> Output:
    options = {"TSAN_OPTIONS": "exitcode=66 halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([*command, *cases], capture_output=True, text=True, env={**os.environ, **options})
    lines = [line.split(" ", 3) for line in done.stdout.splitlines()]
    results = [Result(line[0], line[1], int(line[2]), line[3]) for line in lines if len(line) == 4]
    return Output(done.returncode, results, done.stderr)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def plain(builder: Builder) -> list[str]:
    return builder.program("emulator", "plain", KERNELS, ["emulator_program.cpp"])


@pytest.fixture(scope="module")
def with_tsan(builder: Builder) -> list[str]:
    return builder.program("emulator", "thread", KERNELS, ["emulator_program.cpp"])


def check_right(program: Sequence[str], seeds: int, names: Sequence[str]) -> None:
    cases = [f"{name}:{order}:{seeds if order == 'random' else 1}" for name in names for order in ORDERS]
    output = run(program, *cases)
    assert output.code == 0, output.errors
    assert output.errors == ""
    assert [result for result in output.results if result.text != "ok"] == []
    assert len(output.results) == len(names) * (2 + seeds)


def test_right_kernels(plain: list[str]) -> None:
    check_right(plain, 10, [*RIGHT, *FUNCTIONS, "host_threads", "after_errors"])


@pytest.fixture(scope="module")
def with_asan(builder: Builder) -> list[str]:
    return builder.program("emulator", "address", KERNELS, ["emulator_program.cpp"])


def test_right_kernels_under_address_sanitizer(with_asan: list[str]) -> None:
    check_right(with_asan, 3, [*RIGHT, *FUNCTIONS, "host_threads", "after_errors"])


def test_an_element_too_many(with_asan: list[str]) -> None:
    """Of an array that nobody registered, by a plain pointer: AddressSanitizer's to find."""
    output = run(with_asan, "count_past_the_end:forward:1")
    assert output.code not in (0, 66)
    assert "AddressSanitizer: heap-buffer-overflow" in output.errors
    assert "planted_kernels.cu:" in output.errors


def test_right_kernels_under_thread_sanitizer(with_tsan: list[str]) -> None:
    check_right(with_tsan, 5, [*RIGHT, *FUNCTIONS, "host_threads"])  # what runs after_errors races by design


def test_right_kernels_on_portable_fibers(builder: Builder) -> None:
    program = builder.program("emulator", "ucontext", KERNELS, ["emulator_program.cpp"])
    check_right(program, 1, [*RIGHT, *FUNCTIONS, "host_threads", "after_errors"])


@pytest.mark.parametrize("bug", WRONG)
def test_wrong_results(plain: list[str], bug: str) -> None:
    orders, seeds = WRONG[bug]
    results = run(plain, *(f"{bug}:{order}:{20 if order == 'random' else 1}" for order in ORDERS)).results
    wrong = [result.order for result in results if result.text == "wrong"]
    assert set(orders) <= set(wrong)
    assert wrong.count("random") >= seeds


@pytest.mark.parametrize("bug", RACES)
def test_races(with_tsan: list[str], bug: str) -> None:
    """In random order, where the copies of product_overwrites_stage take their time, and in the others for the rest."""
    orders = ["random"] if bug == "product_overwrites_stage" else ORDERS
    for order in orders:
        output = run(with_tsan, f"{bug}:{order}:1")
        assert output.code == 66, f"{order}: {output.results} {output.errors}"
        assert "WARNING: ThreadSanitizer: data race" in output.errors
        assert "planted_kernels.cu:" in output.errors or "ptx.cuh:" in output.errors


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse(plain: list[str], misuse: str) -> None:
    source = (HERE / "misuse_kernels.cu").read_text().splitlines()
    places = [i for i, line in enumerate(source, 1) if line.endswith(f"// place: {misuse}")]
    assert places
    results = run(plain, *(f"{misuse}:{order}:{5 if order == 'random' else 1}" for order in ORDERS)).results
    assert len(results) == 7
    for result in results:
        assert result.text.startswith("error glam emulator: "), result
        for place in places:
            assert f"misuse_kernels.cu:{place}" in result.text, result


def test_messages(plain: list[str]) -> None:
    """The wording of some, as a reader meets them."""
    source = (HERE / "misuse_kernels.cu").read_text().splitlines()

    def lines(name: str) -> list[int]:
        return [i for i, line in enumerate(source, 1) if line.endswith(f"// place: {name}")]

    names = ["divergent_barrier", "missing_lane", "misaligned_copy", "out_of_bounds_read", "much_shared"]
    messages = [result.text for result in run(plain, *(f"{name}:forward:1" for name in names)).results]
    first, second = lines("divergent_barrier")
    assert messages[0] == (
        "error glam emulator: divergent_barrier_kernel, block (0, 0, 0), thread (32, 0, 0): divergent barriers: "
        f"others of the block wait in __syncthreads at misuse_kernels.cu:{first}, this one has come to "
        f"__syncthreads at misuse_kernels.cu:{second}"
    )
    shuffle, barrier = lines("missing_lane")
    assert messages[1] == (
        "error glam emulator: missing_lane_kernel, block (0, 0, 0): deadlock: no thread can go on; 62 waiting in "
        f"__shfl_xor_sync at misuse_kernels.cu:{shuffle} with mask 0xffffffff, the first is thread (0, 0, 0); "
        f"2 waiting in __syncthreads at misuse_kernels.cu:{barrier}, the first is thread (7, 0, 0)"
    )
    assert "which is no multiple of 16" in messages[2]
    assert "outside every registered array (byte 64 after the start of x, which has 64)" in messages[3]
    assert f"cannot be launched with {163 * 1024 + 1} bytes of shared memory" in messages[4]


def test_stack_overflow_ends_the_program(plain: list[str]) -> None:
    assert run(plain, "stack_overflow:forward:1").code == -11


def test_counters(plain: list[str]) -> None:
    output = subprocess.run([*plain, "--count"], check=True, capture_output=True, text=True).stdout
    report, table = output.split("\n", 1)
    counts = json.loads(report)
    launch = {"kernel": "counted_kernel", "grid": [3, 1, 1], "block": [32, 1, 1], "shared_bytes": 8320}
    assert counts["launches"] == [
        launch,
        launch,
        {"kernel": "scalars_kernel", "grid": [1, 2, 1], "block": [1, 1, 1], "shared_bytes": 0},
    ]
    source = (HERE / "function_kernels.cu").read_text().splitlines()
    place = {line.split("// count: ")[1]: i for i, line in enumerate(source, 1) if "// count: " in line}
    found = {access["line"]: access for access in counts["accesses"]}
    # (warp accesses, bytes, cost, needed) of one block; 2 launches of 3 blocks each.
    expected = {
        "together": ("global", "read", 1, 128, 4, 4),
        "apart": ("global", "read", 1, 128, 32, 4),
        "vector": ("global", "read", 1, 512, 16, 16),
        "same": ("global", "read", 1, 128, 1, 1),
        "conflicts": ("shared", "write", 2, 256, 64, 2),
        "padded": ("shared", "write", 2, 256, 2, 2),
        "half": ("global", "write", 1, 64, 2, 2),
        "atomic": ("global", "atomic", 1, 128, 1, 1),
    }
    for name, (space, kind, *numbers) in expected.items():
        access = found[place[name]]
        assert (access["kernel"], access["file"]) == ("counted_kernel", "function_kernels.cu")
        assert (access["space"], access["access"]) == (space, kind)
        values = [access[key] for key in ("warp_accesses", "bytes", "cost", "needed")]
        assert values == [6 * number for number in numbers], name
    assert len(found) == len(expected)
    assert "2 x counted_kernel grid [3, 1, 1] block [32, 1, 1] shared 8320" in table
    assert re.search(
        r"function_kernels.cu:\d+ +global read +6 warp accesses +768 bytes +192 sectors, 24 needed \(8.00\)", table
    )


def test_settings_from_the_environment(plain: list[str]) -> None:
    environment = {**os.environ, "GLAM_EMULATOR_ORDER": "sideways"}
    output = subprocess.run([*plain, "--count"], capture_output=True, text=True, env=environment)
    assert output.returncode != 0
    assert "GLAM_EMULATOR_ORDER: expected forward, reverse or random, got sideways" in output.stderr


def test_ptx_against_plain_cpp(builder: Builder) -> None:
    for sanitizer in ("plain", "address"):
        program = builder.program("ptx_probe", sanitizer, ["ptx_probe.cu"], [])
        for order in ORDERS:
            environment = {**os.environ, "GLAM_EMULATOR_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
            output = subprocess.run(program, capture_output=True, text=True, env=environment)
            assert (output.stdout, output.returncode) == ("ok\n", 0), output.stderr
