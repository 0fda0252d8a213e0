"""Reading a checkpoint folder back: configuration, weights, optimiser state and trainer state.

Whatever layout of ranks wrote the folder, any other reads it: each rank says which part of each tensor it wants, and
reads the bytes of that part from the files that have some of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glam_ext.checkpoint.errors import CheckpointError, together
from glam_ext.checkpoint.folder import TRAINER, USE_ANOTHER, VerifiedFolder, find_checkpoint
from glam_ext.checkpoint.stored import stored_tensors, wanted_box
from glam_ext.config import GLaMConfig
from glam_ext.distributed.ranks import ONE_PROCESS, Ranks

# From a tensor's name and whole shape to the slices of it that a rank wants; None or () is all of it.
PartOf = Callable[[str, tuple[int, ...]], tuple[slice, ...] | None]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. Tensors are on the CPU, by global name; ``trainer`` is empty for an exported model."""

    path: Path
    config: GLaMConfig
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    trainer: dict[str, Any]

    @property
    def step(self) -> int | None:
        """The step of trainer.json, None for an exported model."""
        return self.trainer.get("step")


def load_checkpoint(
    path: str | os.PathLike[str],
    hashes: bool = True,
    *,
    part: PartOf | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> Checkpoint:
    """Loads the folder ``path``, or the newest good one of a run folder or of its checkpoints/ folder.

    A damaged or half-written folder is skipped with a warning while searching and refused with
    :class:`CheckpointError` when named; so is one in which an element of a tensor is lost or there twice.
    ``hashes=False`` trusts the content of files whose size is right.

    Args:
        part: which box of each tensor, of the model and of the optimiser alike, is wanted here, by default all: slices
            without steps inside the whole shape, otherwise ValueError. No other bytes are read, except for hashes.
        ranks: every one of them calls this, and either all load the same folder or all raise.
    """
    folder = find_checkpoint(path, hashes, ranks=ranks)

    def load() -> Checkpoint:
        return Checkpoint(
            path=folder.path,
            config=folder.config,
            model=_load_tensors(folder, "model", part),
            optimizer=_load_tensors(folder, "optimizer", part),
            trainer=load_trainer(folder),
        )

    return together(ranks, load, lambda error: f"{folder.path}: cannot be read ({error}); {USE_ANOTHER}")


def _load_tensors(folder: VerifiedFolder, stem: str, part: PartOf | None) -> dict[str, torch.Tensor]:
    loaded = {}
    for name, tensor in stored_tensors(folder, stem).items():
        slices = None if part is None else part(name, tensor.shape)
        loaded[name] = tensor.read(*wanted_box(name, tensor.shape, slices))
    return loaded


def load_trainer(folder: VerifiedFolder) -> dict[str, Any]:
    """trainer.json of a folder; empty for an exported model."""
    if not folder.has(TRAINER):
        return {}
    file = folder.path / TRAINER
    try:
        trainer = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}; use another checkpoint") from error
    if not isinstance(trainer, dict):
        raise CheckpointError(f"{file}: expected a JSON object; use another checkpoint")
    return trainer
