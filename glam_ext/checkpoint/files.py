"""Making a checkpoint folder so that a crash, a kill or a full disk at any moment loses nothing that was complete.

Order: every file is written and synced in a temporary folder, the folder is synced and renamed to its final name, its
parent is synced, and only then is COMPLETE made and synced. A folder without COMPLETE does not count.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from glam_ext._files import fsync
from glam_ext.checkpoint.errors import CheckpointError
from glam_ext.checkpoint.folder import (
    CONFIG,
    MANIFEST,
    MARKER,
    TEMPORARY_PREFIX,
    TRAINER,
    ManifestEntry,
    manifest_text,
    sha256_of_file,
)


def temporary_of(final: Path) -> Path:
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}")


def start(temporary: Path, config_text: str) -> None:
    """Makes the temporary folder with config.json in it."""
    temporary.mkdir()
    write_text(temporary / CONFIG, config_text)


def entry_of(file: Path) -> ManifestEntry:
    """Hashed from the file, so that what a reader will see is what is vouched for."""
    return ManifestEntry(file.name, file.stat().st_size, sha256_of_file(file))


def publish(temporary: Path, final: Path, entries: Sequence[ManifestEntry], trainer_text: str | None) -> None:
    """Turns a temporary folder with config.json and the tensor files `entries` into the good folder `final`.

    If that fails there is no `final`; the temporary folder may be left.
    """
    for entry in entries:
        file = temporary / entry.file
        if not file.is_file() or file.stat().st_size != entry.size:
            raise CheckpointError(
                f"{file}: was written with {entry.size} bytes by its rank and is not here; checkpoints of several "
                "ranks need a file system that all of them share"
            )
    small = [temporary / CONFIG]
    if trainer_text is not None:
        small.append(temporary / TRAINER)
        write_text(temporary / TRAINER, trainer_text)
    listed = sorted([*entries, *map(entry_of, small)], key=lambda entry: entry.file)
    write_text(temporary / MANIFEST, manifest_text(listed))
    fsync(temporary)
    os.rename(temporary, final)
    try:
        fsync(final.parent)
        (final / MARKER).touch(exist_ok=False)
        fsync(final / MARKER)
        fsync(final)
    except BaseException:  # what may not be on disk does not count, marker or not
        (final / MARKER).unlink(missing_ok=True)
        shutil.rmtree(final, ignore_errors=True)
        raise


def write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    fsync(file)


def make_durable_folder(folder: Path) -> None:
    """mkdir -p whose every new entry survives a power cut."""
    if folder.is_dir():
        return
    make_durable_folder(folder.absolute().parent)
    folder.mkdir(exist_ok=True)
    fsync(folder.absolute().parent)


def delete(folder: Path) -> None:
    """Deletes in one visible step: a kill in the middle leaves a temporary name, never half a checkpoint."""
    doomed = folder.with_name(f"{TEMPORARY_PREFIX}delete-{folder.name}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
