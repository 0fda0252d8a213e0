"""CheckpointError, and how several ranks fail together: none goes on, and none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from glam_ext import _C
from glam_ext.distributed.ranks import Ranks

T = TypeVar("T")

# Raised for every file or folder that cannot be used; the message names it and says what to do.
CheckpointError: type[RuntimeError] = _C.CheckpointError


def together(ranks: Ranks, action: Callable[[], T], explain: Callable[[OSError], str]) -> T:
    """What `action()` returns here, once it is known that it failed on no rank.

    One all_gather on every rank, whatever happens, so `action` must not call it. If any rank failed, all raise: a
    CheckpointError that names the rank and its reason (an OSError is put into words by `explain`), except that a rank
    whose own failure is neither of these (a wrong argument, an interrupt) raises that one.
    """
    failure: BaseException | None = None
    try:
        result = action()
    except BaseException as error:
        failure = error
    reasons = ranks.all_gather(None if failure is None else _reason(failure, explain))
    failed = {rank: reason for rank, reason in enumerate(reasons) if reason is not None}
    if not failed:
        return result
    alone = ranks.world_size == 1
    if failure is not None and not isinstance(failure, OSError) and (alone or not isinstance(failure, CheckpointError)):
        raise failure
    raise CheckpointError(_message(failed, ranks.world_size)) from failure


def first_only(ranks: Ranks, action: Callable[[], None]) -> Callable[[], None]:
    """`action` on rank 0, nothing on the others: for what is one rank's work but every rank's failure."""
    return action if ranks.rank == 0 else lambda: None


def _reason(failure: BaseException, explain: Callable[[OSError], str]) -> str:
    if isinstance(failure, OSError):
        return explain(failure)
    return str(failure) if isinstance(failure, CheckpointError) else f"{type(failure).__name__}: {failure}"


def _message(failed: dict[int, str], world_size: int) -> str:
    first, reason = next(iter(failed.items()))
    if len(failed) == world_size and set(failed.values()) == {reason}:
        return reason
    others = ", ".join(str(rank) for rank in failed if rank != first)
    return f"rank {first}: {reason}" + (f" (failed as well: rank {others})" if others else "")
