"""``glam verify FOLDER``: says whether a checkpoint folder, or every one of a run, is whole.

Compares every file with the manifest (size and SHA-256) and parses every safetensors header; exit status 1 when any
folder is damaged or half-written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from glam_ext import _C
from glam_ext.checkpoint.folder import (
    MANIFEST,
    MARKER,
    CheckpointError,
    VerifiedFolder,
    step_folders,
    step_of,
    verify_checkpoint,
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="glam verify", description="Check that checkpoint folders are whole.")
    parser.add_argument("folder", type=Path, help="a checkpoint folder, a checkpoints/ folder or a run folder")
    parser.add_argument("--sizes-only", action="store_true", help="compare file sizes only: fast, finds truncation")
    arguments = parser.parse_args(argv)

    folders = _folders(arguments.folder)
    if not folders:
        print(f"{arguments.folder}: has no checkpoint (no folder called step-000123); check the path")
        return 1
    damaged = 0
    for folder in folders:
        try:
            _report(verify_checkpoint(folder, hashes=not arguments.sizes_only))
        except CheckpointError as error:
            damaged += 1
            print(f"BAD   {error}")
    return 1 if damaged else 0


def _folders(path: Path) -> list[Path]:
    if step_of(path) is not None or (path / MANIFEST).is_file() or (path / MARKER).is_file():
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return step_folders(root) if root.is_dir() else []


def _report(folder: VerifiedFolder) -> None:
    tensors = 0
    for stem in ("model", "optimizer"):
        for file in folder.tensor_files(stem):
            tensors += len(_C.read_safetensors(file))
    size = sum(entry.size for entry in folder.files)
    print(f"good  {folder.path}: {len(folder.files)} files, {tensors} tensors, {size:,} bytes")
