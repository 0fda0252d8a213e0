"""Reading a checkpoint folder back: configuration, weights, optimiser state and trainer state."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file

from glam_ext.checkpoint.folder import TRAINER, CheckpointError, VerifiedFolder, find_checkpoint
from glam_ext.config import GLaMConfig


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


def load_checkpoint(path: str | os.PathLike[str], hashes: bool = True) -> Checkpoint:
    """Loads the folder ``path``, or the newest good one of a run folder or of its checkpoints/ folder.

    A damaged or half-written folder is skipped with a warning while searching and refused with
    :class:`CheckpointError` when named. ``hashes=False`` trusts the content of files whose size is right.
    """
    folder = find_checkpoint(path, hashes)
    return Checkpoint(
        path=folder.path,
        config=folder.config,
        model=_load_tensors(folder, "model"),
        optimizer=_load_tensors(folder, "optimizer"),
        trainer=load_trainer(folder),
    )


def _load_tensors(folder: VerifiedFolder, stem: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.tensor_files(stem):
        try:
            loaded = load_file(file)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: not a whole safetensors file: {error}; use another checkpoint or copy this one again"
            ) from error
        repeated = sorted(loaded.keys() & tensors.keys())
        if repeated:
            raise CheckpointError(f"{file}: tensor {repeated[0]} is also in another file; use another checkpoint")
        tensors.update(loaded)
    return tensors


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
