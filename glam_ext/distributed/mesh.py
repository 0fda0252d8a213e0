"""Mesh: the processes of a run as a grid of data x expert, and the process groups along its axes.

Rank r has the coordinates (r // P, r % P): the P ranks that share one copy of all experts are neighbours, and each of
them holds E / P experts of every MoE layer. Every rank trains on its own rows. Everything else is told by the names of
process groups, so this file alone knows how ranks are numbered:

    expert   the P ranks whose experts together are all experts; rows travel between them
    data     the W / P ranks that hold the same experts; gradients of experts are summed over them
    world    all W ranks; gradients of everything else are summed over them

A third axis (tensor) is one more entry of AXES. Under torchrun the environment says who is who; without it the mesh is
one process and all names are "".
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import math
import os
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from glam_ext.distributed.heartbeat import Heartbeat
from glam_ext.distributed.ranks import Ranks

T = TypeVar("T")

AXES = ("data", "expert")  # the last one varies fastest with the rank


class LostRankError(RuntimeError):
    """Another process of the run is gone. The message names it."""


class Mesh(Ranks):
    """The ranks of this run. Build it with `init_mesh`, leave it with `close`."""

    def __init__(
        self,
        rank: int = 0,
        groups: Mapping[str, dist.ProcessGroup | None] | None = None,
        sizes: tuple[int, ...] = (1, 1),
    ) -> None:
        self._rank, self._sizes = rank, dict(zip(AXES, sizes, strict=True))
        self._groups = dict(groups or {})
        self._heartbeat: Heartbeat | None = None

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return math.prod(self._sizes.values())

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once: logs, metrics, manifests."""
        return self._rank == 0

    def axis_size(self, axis: str) -> int:
        """Of "data" or "expert"."""
        return self._sizes[axis]

    def group_name(self, axis: str) -> str:
        """Of "data", "expert" or "world", as the ops take it; "" for a group of one."""
        group = self._groups.get(axis)
        return "" if group is None else group.group_name

    def all_gather(self, value: T) -> list[T]:
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks learn the same. On the host."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes)

    @torch.no_grad()
    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds the tensor up over all ranks, in place; every rank gets the same bits."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Inside, a transfer that fails because a rank is gone raises `LostRankError`, which names it."""
        try:
            yield
        except RuntimeError as error:
            lost = "" if self._heartbeat is None else self._heartbeat.lost_ranks()
            if not lost:
                raise
            raise LostRankError(
                f"{lost}; the same command goes on from the newest checkpoint, and torchrun --max-restarts repeats it"
            ) from error

    def close(self) -> None:
        """Leaves the process groups, after all ranks came here."""
        if self.world_size == 1 or not dist.is_initialized():
            return
        dist.barrier()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        gc.collect()  # Gloo's threads must not outlive the groups
        dist.destroy_process_group()


def init_mesh(expert: int = 1, timeout: float = 600.0) -> Mesh:
    """The mesh of this run, W / expert x expert; joins torch's default process group if it is not there yet.

    Args:
        expert: P, the ranks over which the experts are spread.
        timeout: seconds after which a transfer that a rank does not join is an error.

    Raises ValueError where P does not divide the number of ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized():
        world_size = dist.get_world_size()
    if expert < 1 or world_size % expert:
        raise ValueError(
            f"parallel.expert: expected a divisor of the {world_size} processes, got {expert}; start the run under "
            f"torchrun with a multiple of {max(expert, 1)} processes, or change parallel.expert"
        )
    if world_size == 1:
        return Mesh()
    limit = datetime.timedelta(seconds=timeout)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=limit)))
        # torchrun may keep one store over restarts: a new process must not find the address of one that is gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"glam/attempt/{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    rank = dist.get_rank()
    sizes = (world_size // expert, expert)
    groups: dict[str, dist.ProcessGroup | None] = {"world": dist.group.WORLD}
    for axis, name in enumerate(AXES):
        groups[name] = _group_along(axis, sizes, rank, limit)
    mesh = Mesh(rank, groups, sizes)
    mesh._heartbeat = Heartbeat(rank, world_size)
    return mesh


def _group_along(axis: int, sizes: tuple[int, ...], rank: int, timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """The group of this rank along an axis of the grid; every rank makes every group, in the same order."""
    if sizes[axis] == 1:
        return None
    if sizes[axis] == math.prod(sizes):
        return dist.group.WORLD
    lines = torch.arange(math.prod(sizes)).view(sizes).movedim(axis, -1).reshape(-1, sizes[axis]).tolist()
    mine: dist.ProcessGroup | None = None
    for line in lines:
        group = dist.new_group(line, timeout=timeout)
        if rank in line:
            mine = group
    return mine
