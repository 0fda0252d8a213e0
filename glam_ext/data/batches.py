"""Batches for training and evaluation out of a token folder.

Training: one global counter of samples (rows) drives everything. Sample i is row order(seed, epoch)[i mod N] of epoch
i div N; a step takes the next B samples, also across the end of an epoch, and rank r of P takes the r-th of P equal
parts. So the data of a step depend on (seed, counter, B) alone, whatever the number of ranks, and the counter is all
that resuming needs. B sequences, S positions, N rows, P ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from glam_ext import _C
from glam_ext.data.errors import DataError
from glam_ext.data.packing import Row
from glam_ext.data.token_files import TokenFolder


class Batch(NamedTuple):
    """tokens, targets int64 [B, S]; weights float32 [B, S], 0 on padding; segment_ids int32 [B, S], 0 on padding."""

    tokens: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segment_ids: torch.Tensor


class Whole(NamedTuple):
    """The batch of all ranks together, of which this rank has a share."""

    num_rows: int
    num_real: int
    """Targets of non-zero weight."""
    first_row: int
    """Of this rank's share."""


class BatchSampler:
    """The endless sequence of training batches, for one rank. `batch_size` is global: rows of all ranks together."""

    def __init__(
        self,
        data: TokenFolder,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"BatchSampler: expected rank in [0, {world_size}), got {rank}")
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"BatchSampler: expected batch_size to be a multiple of world_size = {world_size} above 0, "
                f"got {batch_size}"
            )
        self.data, self.batch_size, self.seed, self.shuffle = data, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.samples = 0
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def next_share(self) -> tuple[Batch, Whole]:
        """This rank's part of the next batch, [batch_size / world_size, S], and what it is a part of.

        Every rank reads the segment ids of the whole batch, so that all know its number of real targets and none has to
        ask. Moves the counter on by batch_size.
        """
        share = self.batch_size // self.world_size
        indices = self._rows_of(self.samples, self.batch_size)
        first = self.rank * share
        batch = _batch(self.data.rows(indices[first : first + share]))
        num_real = int(np.count_nonzero(self.data.segment_ids[indices]))
        self.samples += self.batch_size
        return batch, Whole(self.batch_size, num_real, first)

    def next_batch(self) -> Batch:
        """`next_share` without the rest."""
        return self.next_share()[0]

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.samples / len(self.data)

    def state_dict(self) -> dict[str, Any]:
        """The global position, the same on every rank, and what it refers to."""
        return {
            "samples": self.samples,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "num_rows": len(self.data),
            "data_sha256": self.data.manifest.files["targets"]["sha256"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` stopped. Raises DataError if it belongs to other data, another seed or order."""
        expected = self.state_dict()
        for key in expected.keys() - {"samples"}:
            if state.get(key) != expected[key]:
                raise DataError(
                    f"{self.data.folder}: cannot resume, {key} is {expected[key]} here and {state.get(key)} in the "
                    "checkpoint; use the data and settings of the run, or start a new run"
                )
        self.samples = int(state["samples"])

    def _rows_of(self, first_sample: int, count: int) -> NDArray[np.int64]:
        """Row indices of the samples first_sample, first_sample + 1, ..."""
        if not self.shuffle:
            return np.arange(first_sample, first_sample + count) % len(self.data)
        indices = np.empty(count, np.int64)
        for position, sample in enumerate(range(first_sample, first_sample + count)):
            epoch, offset = divmod(sample, len(self.data))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, epoch_order(self.seed, epoch, len(self.data))
            indices[position] = self._order[offset]
        return indices


def sequential_batches(data: TokenFolder, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """Every row once, in order, for evaluation: rank r's parts of batches of `batch_size` rows of all ranks together.

    All ranks get the same number of batches of the same shape; rows beyond the last are padding of weight 0.
    """
    if batch_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
        raise ValueError(
            f"sequential_batches: expected batch_size to be a multiple of world_size = {world_size} above 0 and rank "
            f"below it, got {batch_size} and {rank}"
        )
    share = batch_size // world_size
    for first in range(rank * share, rank * share + len(data), batch_size):
        rows = data.rows(np.arange(first, min(first + share, len(data))))
        missing = share - len(rows.tokens_S)
        yield _batch(Row(*(np.pad(array, ((0, missing), (0, 0))) for array in rows)))


def epoch_order(seed: int, epoch: int, num_rows: int) -> NDArray[np.int64]:
    """A permutation of the rows that is a function of (seed, epoch) alone: the rows sorted by a hash of their index.

    splitmix64 (csrc/data/batch_sampler.cpp) rather than a random generator, whose stream another version may change.
    """
    return _C.epoch_order(seed % 2**64, epoch, num_rows).numpy()


def _batch(rows: Row) -> Batch:
    tokens, targets, segment_ids = (torch.from_numpy(array) for array in rows)
    return Batch(tokens, targets, (segment_ids != 0).to(torch.float32), segment_ids.to(torch.int32))
