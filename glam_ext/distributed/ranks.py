"""Ranks: what host code needs of the processes that train together, and nothing about how they are laid out.

One process is `ONE_PROCESS`; a run of many has a `glam_ext.distributed.Mesh`, which is a `Ranks` too.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

T = TypeVar("T")


class Ranks(Protocol):
    """The processes of a run. Every rank calls `all_gather` the same number of times, in the same order."""

    @property
    def rank(self) -> int:
        """Of this process, 0 <= rank < world_size."""

    @property
    def world_size(self) -> int: ...

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, by rank. Values are small, plain and picklable; the call is also a barrier."""


class OneProcess:
    """A process alone."""

    rank = 0
    world_size = 1

    def all_gather(self, value: T) -> list[T]:
        return [value]


ONE_PROCESS: Ranks = OneProcess()
