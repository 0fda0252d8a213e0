"""Saving a checkpoint from one rank or from many: glam_ext.checkpoint.files says in which order, and why.

Each rank writes a file of its own, with what share_out gives it to write; the ranks tell each other what they hold,
what they wrote and whether anything failed, never a tensor. Folders are made, renamed and removed by rank 0 alone.
Older folders are deleted after the new one is complete, so at every moment the newest complete one is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from glam_ext._files import fsync
from glam_ext.checkpoint import files
from glam_ext.checkpoint.errors import CheckpointError, first_only, together
from glam_ext.checkpoint.folder import (
    CONFIG,
    MARKER,
    STEMS,
    TEMPORARY_PREFIX,
    ManifestEntry,
    step_folders,
    step_name,
    step_of,
    tensor_file_name,
    verify_checkpoint,
)
from glam_ext.checkpoint.shards import (
    Facts,
    Key,
    Piece,
    as_piece,
    check_model_shapes,
    facts_of,
    file_metadata,
    share_out,
)
from glam_ext.checkpoint.tensor_file import Record, write_tensor_file
from glam_ext.config import GLaMConfig
from glam_ext.distributed.ranks import ONE_PROCESS, Ranks

Held = Mapping[str, Tensor | Piece]


def save_checkpoint(
    root: str | os.PathLike[str],
    step: int,
    config: GLaMConfig,
    model_tensors: Held,
    optimizer_tensors: Held,
    trainer_state: Mapping[str, Any],
    keep: int,
    ranks: Ranks = ONE_PROCESS,
) -> Path:
    """Writes ``root/step-NNNNNN`` and returns it once it is complete on disk. Every rank of `ranks` calls this.

    Args:
        root: the run's checkpoints/ folder, created if absent, on a file system that all ranks share; one run writes to
            it at a time.
        model_tensors, optimizer_tensors: everything this rank holds, by global name, on any device, with any strides. A
            tensor is whole, a :class:`Piece` is a part of one. Of what several ranks hold, one writes its copy; that
            they are equal is not checked.
        trainer_state: what JSON holds; "step" is added. Rank 0's is kept.
        keep: how many good folders up to this step stay (the new one among them); 0 keeps all. Newer ones, left by a
            run that was taken back to an earlier step, are not touched.

    Raises:
        CheckpointError: the disk is full, a path cannot be written, a good folder of this step exists, or the ranks'
            parts are not every element of every tensor exactly once. A failure on any rank is raised on every rank and
            names it; nothing half-written stays and every earlier folder is as it was.
        ValueError, TypeError: a negative step or keep, another step, keep or configuration on another rank, a trainer
            state that JSON cannot hold, a dtype that safetensors does not have.
    """
    root = Path(root)
    final = root / step_name(step)
    temporary = files.temporary_of(final)
    held = dict(zip(STEMS, (model_tensors, optimizer_tensors), strict=True))
    config_text = config.to_json(indent=1) + "\n"

    def explain(error: OSError) -> str:
        return (
            f"{final}: the checkpoint could not be saved: {error}; make room in {root} (earlier checkpoints there are "
            "untouched) or point the run at another disk"
        )

    # 1. What there is to write, and who writes it: nothing is touched before everybody agrees.
    claim, trainer_text = together(ranks, lambda: _check(step, config_text, held, trainer_state, keep), explain)
    claims = ranks.all_gather(claim)
    _check_agreement(claims)
    holdings = [other.holding for other in claims]
    try:
        if ranks.world_size > 1:  # alone, one can only hold what is whole
            check_model_shapes(config, holdings)
        mine = share_out(holdings)[ranks.rank]
    except CheckpointError as error:
        raise CheckpointError(f"{final}: nothing was saved: {error}") from error

    # 2. The folder.
    try:
        together(ranks, first_only(ranks, lambda: _prepare(final, temporary, config_text)), explain)
        entries = together(ranks, lambda: _write_share(temporary, config_text, held, mine, ranks), explain)
        everything = [entry for share in ranks.all_gather(entries) for entry in share]
        publish = first_only(ranks, lambda: files.publish(temporary, final, everything, trainer_text))
        together(ranks, publish, explain)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    # 3. The old ones.
    together(ranks, first_only(ranks, lambda: _prune(root, step, keep)), explain)
    return final


class _Claim(NamedTuple):
    """What a rank says of itself before a save."""

    step: int
    keep: int
    config_text: str
    holding: dict[Key, Facts]


def _check(
    step: int, config_text: str, held: Mapping[str, Held], trainer_state: Mapping[str, Any], keep: int
) -> tuple[_Claim, str]:
    """This rank's claim and the text of trainer.json; ValueError, TypeError."""
    if step < 0 or keep < 0:
        raise ValueError(f"save_checkpoint: expected step and keep to be at least 0, got step {step} and keep {keep}")
    if trainer_state.get("step", step) != step:
        raise ValueError(f"save_checkpoint: expected trainer_state['step'] to be {step}, got {trainer_state['step']}")
    trainer_text = json.dumps({"step": step, **trainer_state}, indent=1, allow_nan=False) + "\n"
    holding = {(stem, name): facts_of(name, value) for stem in held for name, value in held[stem].items()}
    return _Claim(step, keep, config_text, holding), trainer_text


def _check_agreement(claims: list[_Claim]) -> None:
    for field, what in (("step", "step"), ("keep", "keep"), ("config_text", "configuration")):
        values = [getattr(claim, field) for claim in claims]
        for rank, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"save_checkpoint: expected the same {what} on every rank, got {values[0]} on rank 0 and {value} "
                    f"on rank {rank}"
                )


def _prepare(final: Path, temporary: Path, config_text: str) -> None:
    files.make_durable_folder(final.parent)
    for leftover in final.parent.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover)
    _make_way(final)
    files.start(temporary, config_text)


def _make_way(final: Path) -> None:
    """Sets aside a half-written or damaged folder of the same step; a good one is never replaced."""
    if not final.exists():
        return
    try:
        verify_checkpoint(final)
    except CheckpointError:
        files.delete(final)
        return
    raise CheckpointError(
        f"{final}: a good checkpoint of this step exists and is not replaced; move it and every newer folder away first"
    )


def _write_share(
    temporary: Path, config_text: str, held: Mapping[str, Held], mine: set[Key], ranks: Ranks
) -> list[ManifestEntry]:
    """This rank's files, synced, with its share of what it holds."""
    if ranks.rank != 0:
        _check_shared(temporary / CONFIG, config_text)
    entries = []
    for stem, tensors in held.items():
        pieces = {name: as_piece(value) for name, value in tensors.items() if (stem, name) in mine}
        facts = {name: facts_of(name, piece) for name, piece in pieces.items()}
        records = {name: _record(piece.tensor) for name, piece in pieces.items()}
        file = temporary / tensor_file_name(stem, ranks.rank, ranks.world_size)
        write_tensor_file(file, records, file_metadata(facts))
        fsync(file)
        entries.append(files.entry_of(file))
    return entries


def _record(tensor: Tensor) -> Record:
    return Record(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _check_shared(file: Path, text: str) -> None:
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        raise CheckpointError(
            f"{file.parent}: rank 0 made this folder and it is not visible here; put the run's folder on a file system "
            "that all ranks share"
        )


def _prune(root: Path, step: int, keep: int) -> None:
    good = 0
    for folder in step_folders(root):
        if (step_of(folder) or 0) > step:
            continue
        half_written = not (folder / MARKER).exists()
        if half_written or (keep > 0 and good >= keep):
            try:
                files.delete(folder)
            except OSError as error:  # the new checkpoint is safe; a run does not end because an old one stays
                warnings.warn(f"{folder}: an old checkpoint could not be deleted: {error}", stacklevel=5)
        else:
            good += _is_good(folder)


def _is_good(folder: Path) -> bool:
    try:
        verify_checkpoint(folder, hashes=False)
    except CheckpointError:
        return False
    return True
