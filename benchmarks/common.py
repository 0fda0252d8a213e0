"""What the benchmarks share: a header that says what ran where, alternating timings, peak memory."""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping

import torch

import glam_ext

_SLOW_SECONDS = 5.0


def parser(description: str) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    result.add_argument("--repeats", type=int, default=7)
    return result


def print_header() -> None:
    """CPU, instruction sets in use and page policy: a ratio means something only beside these."""
    info = glam_ext.build_info()
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    pages = "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "default pages"
    print(f"{cpu}; torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}); {pages}; build {info}")


def medians(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a slow moment of the machine meets all of them.

    The order is drawn anew each turn, so that none always follows the same one; it is the same in every process. One
    whose first call, which is not counted, takes seconds takes the first turn only.
    """
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def timed(name: str) -> float:
        start = time.perf_counter()
        contenders[name]()
        return time.perf_counter() - start

    slow = {name for name in contenders if timed(name) > _SLOW_SECONDS}
    for turn in range(repeats):
        for name in order.sample(list(contenders), len(contenders)):
            if turn == 0 or name not in slow:
                times[name].append(timed(name))
    return {name: statistics.median(values) for name, values in times.items()}


class PeakMemory:
    """The process's largest resident size, sampled while it is open."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = _resident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            self.peak = max(self.peak, _resident())
            time.sleep(0.0005)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
