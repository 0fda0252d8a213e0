"""Which rank is gone: a sign of life of every rank in the store that torchrun keeps.

A transfer that fails says at most an address. Each rank therefore writes a counter into the store every INTERVAL
seconds, from a thread of its own; when a transfer fails, the ranks whose counter has stopped are those that are gone.
The store belongs to torchrun's agent (or to rank 0 without it), so it outlives the other ranks.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from typing import Any

import torch.distributed as dist

INTERVAL = 0.5
# A rank that was killed cannot write; one that is busy still does, as the thread is not held up by computation.
PATIENCE = 4 * INTERVAL
# Every rank makes the meshes of a program in the same order.
_numbers = itertools.count()


class Heartbeat:
    """Writes this rank's sign of life until `stop` or the end of the process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size
        self._store = dist.PrefixStore(f"glam/mesh/{next(_numbers)}", _own_connection())
        self._store.set(f"rank/{rank}", f"rank {rank} (process {os.getpid()} on {socket.gethostname()})")
        self._stopped = threading.Event()
        self._beat = 0
        self._write()
        self._thread = threading.Thread(target=self._run, name="glam-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def lost_ranks(self) -> str:
        """Waits for PATIENCE seconds, then names the ranks that gave no sign in that time; "" if all did."""
        try:
            before = self._beats()
            time.sleep(PATIENCE)
            after = self._beats()
            silent = [r for r in range(self._world_size) if r != self._rank and before[r] == after[r]]
            names = [self._store.get(f"rank/{rank}").decode() for rank in silent]
        except RuntimeError:  # torch's DistError too
            return "the store that all ranks share no longer answers"
        if not names:
            return ""
        return f"{', '.join(names)} {'gives' if len(names) == 1 else 'give'} no sign of life"

    def _run(self) -> None:
        while not self._stopped.wait(INTERVAL):
            try:
                self._write()
            except RuntimeError:  # the store is gone; the run's next transfer will say so
                return

    def _write(self) -> None:
        self._beat += 1
        self._store.set(f"beat/{self._rank}", str(self._beat))

    def _beats(self) -> list[bytes]:
        return [self._store.get(f"beat/{rank}") for rank in range(self._world_size)]


def _own_connection() -> dist.Store:
    """A connection that is not shared with torch's groups: a call of theirs may block for as long as a rank is late."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()
