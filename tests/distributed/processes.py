"""Many ranks on one machine: a function in processes that find each other as torchrun's do, through the environment.

The processes are forked from a server that has imported torch once. A rank's verdict is what it returns, written to a
file before anything is shut down, because torch's own shutdown of Gloo aborts now and then.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.guards import PROCESS_SECONDS

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(["torch", "torch.distributed", "glam_ext.training"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(folder: Path, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """function(*arguments) in each of `world_size` processes of one thread; what they return, by rank.

    The function lives in a module that can be imported; it calls `init_mesh` itself. Results are what torch.save holds.
    """
    port = free_port()
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [
        _forkserver.Process(target=_rank, args=(folder, rank, world_size, port, function, arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PROCESS_SECONDS)
    errors = []
    for rank, process in enumerate(ranks):
        if process.is_alive():
            process.kill()
            errors.append(f"rank {rank} did not end in {PROCESS_SECONDS:.0f} s")
        failure = folder / f"rank{rank}.error"
        if failure.exists():
            errors.append(f"rank {rank}: {failure.read_text()}")
    if errors:
        raise AssertionError("\n".join(errors))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(folder: Path, rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        result = function(*arguments)
        torch.save(result, folder / f"rank{rank}.partial")
        (folder / f"rank{rank}.partial").rename(folder / f"rank{rank}.pt")
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # nobody leaves while another still talks to it
    except BaseException:
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
    sys.stdout.flush()
    os._exit(0)
