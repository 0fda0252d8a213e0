"""Ranks as threads of one process: what several processes would do, without starting any."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from glam_ext.distributed.ranks import Ranks

T = TypeVar("T")
# Names and numbers of the tests' few tensors fit in this, none of their weights does.
LARGEST_MESSAGE = 16_000
# A rank that waits longer is taken to wait for ever.
SECONDS = 20


class ThreadRanks:
    """One of several threads."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world_size = len(slots)
        self.calls = 0
        self._slots, self._barrier = slots, barrier

    def all_gather(self, value: T) -> list[T]:
        message = pickle.dumps(value)
        assert len(message) < LARGEST_MESSAGE, f"{len(message)} bytes are not a small message"
        assert b"_rebuild_" not in message, "a message holds no tensor"
        self.calls += 1
        self._slots[self.rank] = message
        self._barrier.wait(SECONDS)
        values = [pickle.loads(slot) for slot in self._slots]
        self._barrier.wait(SECONDS)
        return values


def run_ranks(world_size: int, action: Callable[[Ranks], T]) -> list[T | BaseException]:
    """By rank: what `action` returned or raised. Fails where a rank waits for one that does not come."""
    barrier = threading.Barrier(world_size)
    slots: list[Any] = [None] * world_size
    ranks = [ThreadRanks(rank, slots, barrier) for rank in range(world_size)]
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = action(ranks[rank])
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hung = [result for result in results if isinstance(result, threading.BrokenBarrierError)]
    assert not hung, f"a rank was left waiting: {results}"
    assert len({rank.calls for rank in ranks}) == 1, "the ranks took part in different numbers of all_gather"
    return results


def succeed(world_size: int, action: Callable[[Ranks], T]) -> list[T]:
    """`run_ranks` of what must work everywhere."""
    results = run_ranks(world_size, action)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]
