"""What the benchmarks of many processes share: starting ranks, and a link that is as slow as one likes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in `world_size` processes of so many threads; what the first one returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, threads, results, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    result = results.get()
    for process in ranks:
        process.join()
    if isinstance(result, BaseException):
        raise result
    return result


def _rank(
    rank: int, world_size: int, port: int, threads: int, results: Any, function: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(threads)
    try:
        result = function(*arguments)
    except BaseException as error:
        result = RuntimeError(f"rank {rank}: {error}")
        results.put(result)
        os._exit(1)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        results.put(result)
    os._exit(0)


class _SlowWork(dist.Work):
    def __init__(self, work: dist.Work, due: float) -> None:
        super().__init__()
        self._work, self._due = work, due

    def wait(self, timeout: Any = None) -> bool:
        self._work.wait()
        time.sleep(max(self._due - time.perf_counter(), 0.0))
        return True


class SlowLink(dist.ProcessGroup):
    """A process group whose all-to-all arrives when a link of this latency and bandwidth would have delivered it.

    Transfers of a rank follow each other on the link; waiting for it costs no processor time, as with a real one.
    """

    def __init__(self, group: dist.ProcessGroup, name: str, latency: float, bytes_per_second: float) -> None:
        super().__init__(group.rank(), group.size())
        self._group, self._latency, self._rate, self._free = group, latency, bytes_per_second, 0.0
        torch._C._distributed_c10d._register_process_group(name, self)

    def all_to_all_single(
        self, out: torch.Tensor, rows: torch.Tensor, received: Any, sent: Any, options: Any
    ) -> dist.Work:
        share = 1 - 1 / self.size() if not sent else 1 - sent[self.rank()] / max(sum(sent), 1)  # the rest stays here
        self._free = max(time.perf_counter(), self._free) + rows.nbytes * share / self._rate
        call = getattr(self._group, "all_to_all_single", None) or self._group.alltoall_base
        return _SlowWork(call(out, rows, received, sent, options), self._free + self._latency)

    alltoall_base = all_to_all_single  # its name before torch 2.13
