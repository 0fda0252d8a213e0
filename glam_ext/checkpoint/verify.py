"""``glam verify FOLDER``: says whether a checkpoint folder, or every one of a run, is whole.

Three things, each only where the one before is in order, and every failure of it named:

    files         each has the size and the SHA-256 of the manifest
    coverage      the parts of every tensor, of the model and of the optimiser, are all its elements, each once
    completeness  the model's tensors are those of config.json, by name and shape

Exit status 1 when any folder is damaged or half-written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from glam_ext.checkpoint.errors import CheckpointError
from glam_ext.checkpoint.folder import (
    STEMS,
    USE_ANOTHER,
    ManifestEntry,
    VerifiedFolder,
    check_file,
    looks_like_checkpoint,
    read_config,
    read_entries,
    search_root,
    step_folders,
)
from glam_ext.checkpoint.shards import model_shapes
from glam_ext.checkpoint.stored import StoredTensor, scan_tensors
from glam_ext.config import GLaMConfig


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="glam verify", description="Check that checkpoint folders are whole.")
    parser.add_argument("folder", type=Path, help="a checkpoint folder, a checkpoints/ folder or a run folder")
    parser.add_argument(
        "--sizes-only",
        action="store_true",
        help="compare sizes instead of content: fast; finds truncation and lost parts, not flipped bits",
    )
    arguments = parser.parse_args(argv)

    folders = _folders(arguments.folder)
    if not folders:
        print(f"{arguments.folder}: has no checkpoint (no folder called step-000123); check the path")
        return 1
    bad = 0
    for folder in folders:
        summary, problems = examine(folder, hashes=not arguments.sizes_only)
        bad += bool(problems)
        print("\n".join(f"BAD   {problem}" for problem in problems) or f"good  {summary}")
    return 1 if bad else 0


def examine(path: Path, hashes: bool = True) -> tuple[str, list[str]]:
    """A line on a folder, and everything that is wrong with it."""
    try:
        entries = read_entries(path)
        problems = [problem for entry in entries if (problem := _refusal(path / entry.file, entry, hashes))]
        if problems:
            return "", problems
        folder = VerifiedFolder(path, read_config(path), entries)
        tensors = {stem: scan_tensors(folder, stem) for stem in STEMS}
    except CheckpointError as error:
        return "", [str(error)]
    found = [tensor.problem() for stem in STEMS for tensor in tensors[stem].values()]
    found = [problem for problem in found if problem] or _misfits(folder.config, tensors["model"])
    count = sum(len(of_stem) for of_stem in tensors.values())
    summary = f"{path}: {len(entries)} files, {count} tensors, {folder.num_bytes:,} bytes"
    return summary, [f"{path}: {problem}; {USE_ANOTHER}" for problem in found]


def _refusal(file: Path, entry: ManifestEntry, hashes: bool) -> str:
    try:
        check_file(file, entry, hashes)
    except CheckpointError as error:
        return str(error)
    return ""


def _misfits(config: GLaMConfig, tensors: dict[str, StoredTensor]) -> list[str]:
    """Where the model's tensors are not those of the configuration."""
    expected = model_shapes(config)
    missing = [f"tensor {name} of config.json's model is missing" for name in expected if name not in tensors]
    unknown = [f"tensor {name} does not belong to config.json's model" for name in tensors if name not in expected]
    misshapen = [
        f"expected tensor {name} to be {list(shape)} by config.json, got {list(tensors[name].shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return missing + unknown + misshapen


def _folders(path: Path) -> list[Path]:
    if looks_like_checkpoint(path):
        return [path]
    root = search_root(path)
    return step_folders(root) if root.is_dir() else []
