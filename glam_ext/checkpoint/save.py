"""Writing a checkpoint folder so that a crash, a kill or a full disk at any moment loses nothing that was complete.

Order: every file is written and synced in a temporary folder, the folder is synced and renamed to step-NNNNNN, its
parent is synced, and only then is COMPLETE made and synced. A folder without COMPLETE does not count. Older folders are
deleted after that, so at every moment the newest complete one is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from glam_ext.checkpoint.folder import (
    CONFIG,
    MANIFEST,
    MARKER,
    TEMPORARY_PREFIX,
    TRAINER,
    CheckpointError,
    ManifestEntry,
    manifest_text,
    sha256_of_file,
    step_folders,
    step_name,
    step_of,
    verify_checkpoint,
)
from glam_ext.config import GLaMConfig


def save_checkpoint(
    root: str | os.PathLike[str],
    step: int,
    config: GLaMConfig,
    model_tensors: Mapping[str, torch.Tensor],
    optimizer_tensors: Mapping[str, torch.Tensor],
    trainer_state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes ``root/step-NNNNNN`` and returns it once it is complete on disk.

    Args:
        root: the run's checkpoints/ folder, created if absent; one process writes to it at a time.
        model_tensors, optimizer_tensors: global names and shapes, any device, any strides.
        trainer_state: what JSON holds; "step" is added.
        keep: how many good folders up to this step stay (the new one among them); 0 keeps all. Newer ones, left by a
            run that was taken back to an earlier step, are not touched.

    Raises:
        CheckpointError: the disk is full, a path cannot be written, or a good folder of this step exists. Nothing
            half-written stays and every earlier folder is as it was.
        ValueError, TypeError: a negative step or keep, a trainer state that JSON cannot hold.
    """
    if step < 0 or keep < 0:
        raise ValueError(f"save_checkpoint: expected step and keep to be at least 0, got step {step} and keep {keep}")
    if trainer_state.get("step", step) != step:
        raise ValueError(f"save_checkpoint: expected trainer_state['step'] to be {step}, got {trainer_state['step']}")
    trainer_text = json.dumps({"step": step, **trainer_state}, indent=1, allow_nan=False) + "\n"

    root = Path(root)
    final = root / step_name(step)
    temporary = root / f"{TEMPORARY_PREFIX}{final.name}"
    renamed = False
    try:
        _make_durable_folder(root)
        _remove_temporaries(root)
        _make_way(final)
        temporary.mkdir()
        _write_content(temporary, config, model_tensors, optimizer_tensors, trainer_text)
        os.rename(temporary, final)
        renamed = True
        _fsync(root)
        (final / MARKER).touch(exist_ok=False)
        _fsync(final / MARKER)
        _fsync(final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if renamed:  # what may not be on disk does not count, marker or not
            (final / MARKER).unlink(missing_ok=True)
            shutil.rmtree(final, ignore_errors=True)
        if isinstance(error, (OSError, safetensors.SafetensorError)):
            raise CheckpointError(
                f"{final}: the checkpoint could not be saved: {error}; make room in {root} (earlier checkpoints there "
                "are untouched) or point the run at another disk"
            ) from error
        raise
    _prune(root, step, keep)
    return final


def _write_content(
    folder: Path,
    config: GLaMConfig,
    model_tensors: Mapping[str, torch.Tensor],
    optimizer_tensors: Mapping[str, torch.Tensor],
    trainer_text: str,
) -> None:
    _write_text(folder / CONFIG, config.to_json(indent=1) + "\n")
    _write_tensors(folder / "model.safetensors", model_tensors)
    _write_tensors(folder / "optimizer.safetensors", optimizer_tensors)
    _write_text(folder / TRAINER, trainer_text)
    files = sorted(folder.iterdir())
    # Hashed from the files, so that what a reader will see is what is vouched for.
    entries = [ManifestEntry(file.name, file.stat().st_size, sha256_of_file(file)) for file in files]
    _write_text(folder / MANIFEST, manifest_text(entries))
    _fsync(folder)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    _fsync(file)


def _write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    plain: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses two tensors of one storage (slices of a flat buffer, say); a copy parts them.
        storage = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if storage in storages else value
        storages.add(storage)
    save_file(plain, file, metadata={"format": "pt"})
    shutil.copymode(file.with_name(CONFIG), file)  # safetensors makes private files; the umask decided on config.json
    _fsync(file)


def _make_durable_folder(folder: Path) -> None:
    """mkdir -p whose every new entry survives a power cut."""
    if folder.is_dir():
        return
    _make_durable_folder(folder.absolute().parent)
    folder.mkdir(exist_ok=True)
    _fsync(folder.absolute().parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_temporaries(root: Path) -> None:
    for leftover in root.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover)


def _make_way(final: Path) -> None:
    """Sets aside a half-written or damaged folder of the same step; a good one is never replaced."""
    if not final.exists():
        return
    try:
        verify_checkpoint(final)
    except CheckpointError:
        _delete(final)
        return
    raise CheckpointError(
        f"{final}: a good checkpoint of this step exists and is not replaced; move it and every newer folder away first"
    )


def _delete(folder: Path) -> None:
    """Deletes in one visible step: a kill in the middle leaves a temporary name, never half a checkpoint."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}delete-{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _prune(root: Path, step: int, keep: int) -> None:
    good = 0
    for folder in step_folders(root):
        if (step_of(folder) or 0) > step:
            continue
        half_written = not (folder / MARKER).exists()
        if half_written or (keep > 0 and good >= keep):
            try:
                _delete(folder)
            except OSError as error:  # the new checkpoint is safe; a run does not end because an old one stays
                warnings.warn(f"{folder}: an old checkpoint could not be deleted: {error}", stacklevel=3)
        else:
            good += _is_good(folder)


def _is_good(folder: Path) -> bool:
    try:
        verify_checkpoint(folder, hashes=False)
    except CheckpointError:
        return False
    return True
