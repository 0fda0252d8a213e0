"""Names, manifest and verification of a checkpoint folder, and the search for the newest good one.

A folder is good when COMPLETE exists, manifest.json is sound, every file it lists is there with its size (and its
SHA-256 when asked), and config.json is a valid configuration. Files it does not list are never read. The C++ side
(glam/checkpoint.h) applies the same rules.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from glam_ext import _C
from glam_ext.config import GLaMConfig

# Raised for every file or folder that cannot be used; the message names it and says what to do.
CheckpointError: type[RuntimeError] = _C.CheckpointError

FORMAT = "glam-checkpoint"
VERSION = 1
MARKER = "COMPLETE"
MANIFEST = "manifest.json"
CONFIG = "config.json"
TRAINER = "trainer.json"
TENSOR_SUFFIX = ".safetensors"
# Everything under such a name is unfinished or about to be deleted, and is removed by the next save.
TEMPORARY_PREFIX = ".tmp-"

_STEP_NAME = re.compile(r"step-([0-9]{1,18})", re.ASCII)
_PLAIN_NAME = re.compile(r"[^./\\\0][^/\\\0]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_USE_ANOTHER = "use another checkpoint or copy this one again from its source"
_HASH_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ManifestEntry:
    file: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class VerifiedFolder:
    """A folder that passed :func:`verify_checkpoint`."""

    path: Path
    config: GLaMConfig
    files: tuple[ManifestEntry, ...]

    def tensor_files(self, stem: str) -> list[Path]:
        """The listed files ``STEM*.safetensors``."""
        return [self.path / entry.file for entry in self.files if is_tensor_file(entry.file, stem)]

    def has(self, file: str) -> bool:
        return any(entry.file == file for entry in self.files)


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def step_of(path: str | os.PathLike[str]) -> int | None:
    """The step in the name of a folder ``step-000123``, None for any other name."""
    match = _STEP_NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def step_folders(root: str | os.PathLike[str]) -> list[Path]:
    """The step folders directly in ``root``, newest first, good or not."""
    found = [path for path in Path(root).iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def is_tensor_file(name: str, stem: str) -> bool:
    return name.startswith(stem) and name.endswith(TENSOR_SUFFIX) and len(name) >= len(stem) + len(TENSOR_SUFFIX)


def sha256_of_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def verify_checkpoint(folder: str | os.PathLike[str], hashes: bool = True) -> VerifiedFolder:
    """Checks one folder; raises :class:`CheckpointError` that names the damaged file and the remedy.

    ``hashes=False`` compares sizes only and reads no tensor.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; give the path of a checkpoint folder")
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path}: half-written: it has no COMPLETE marker; {_USE_ANOTHER}")
    entries = _read_manifest(path / MANIFEST)
    for entry in entries:
        _verify_file(path / entry.file, entry, hashes)
    try:
        config = GLaMConfig.from_json(_read_text(path / CONFIG))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}; if a newer glam_ext wrote it, use that version") from error
    return VerifiedFolder(path, config, entries)


def find_checkpoint(path: str | os.PathLike[str], hashes: bool = True) -> VerifiedFolder:
    """Opens a checkpoint folder, or the newest good one of a run folder or of its checkpoints/ folder.

    A damaged or half-written folder is skipped with a warning that names it while searching, and refused
    (:class:`CheckpointError`) when it is the folder that was named.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give the path of a checkpoint folder or of a run folder")
    if step_of(folder) is not None or (folder / MANIFEST).is_file() or (folder / MARKER).is_file():
        return verify_checkpoint(folder, hashes)
    root = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    refused: list[str] = []
    for candidate in step_folders(root):
        try:
            return verify_checkpoint(candidate, hashes)
        except CheckpointError as error:
            refused.append(str(error))
            warnings.warn(f"skipping a checkpoint: {error}", stacklevel=2)
    if not refused:
        raise CheckpointError(f"{root}: has no checkpoint (no folder called step-000123); check the path")
    raise CheckpointError(f"{root}: has no usable checkpoint; each was refused:\n  " + "\n  ".join(refused))


def manifest_text(entries: list[ManifestEntry]) -> str:
    files = [dataclasses.asdict(entry) for entry in entries]
    return json.dumps({"format": FORMAT, "version": VERSION, "files": files}, indent=1) + "\n"


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {_USE_ANOTHER}") from error


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key is given twice in {keys}; remove one")
    return dict(pairs)


def _read_manifest(file: Path) -> tuple[ManifestEntry, ...]:
    def damaged(what: str) -> RuntimeError:
        return CheckpointError(f"{file}: damaged: {what}; {_USE_ANOTHER}")

    try:
        manifest = json.loads(_read_text(file), object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise damaged(f"not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(f'expected a manifest of the format "{FORMAT}"')
    version: Any = manifest.get("version")
    if not _is_count(version) or version < 1:
        raise damaged("expected a version of at least 1")
    if version > VERSION:
        raise CheckpointError(
            f"{file}: written in checkpoint format {version}, this program reads up to format {VERSION}; "
            "use a newer glam_ext"
        )
    if set(manifest) != {"format", "version", "files"} or not isinstance(manifest["files"], list):
        raise damaged("expected the keys format, version and files")
    entries = []
    for item in manifest["files"]:
        if not isinstance(item, dict) or set(item) != {"file", "size", "sha256"}:
            raise damaged(f"an entry has no file, size and sha256: {item}")
        possible = (
            isinstance(item["file"], str)
            and _PLAIN_NAME.fullmatch(item["file"])
            and _is_count(item["size"])
            and isinstance(item["sha256"], str)
            and _SHA256.fullmatch(item["sha256"])
        )
        if not possible:
            raise damaged(f"an entry is impossible: {item}")
        entries.append(ManifestEntry(**item))
    names = [entry.file for entry in entries]
    if len(set(names)) != len(names):
        raise damaged("a file is listed twice")
    if CONFIG not in names or not any(is_tensor_file(name, "model") for name in names):
        raise damaged("expected config.json and a model*.safetensors among its files")
    return tuple(entries)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _verify_file(file: Path, entry: ManifestEntry, hashes: bool) -> None:
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {_USE_ANOTHER}")
        size = file.stat().st_size
        if size != entry.size:
            raise CheckpointError(
                f"{file}: damaged: it has {size} bytes, the manifest says {entry.size}; {_USE_ANOTHER}"
            )
        if hashes and sha256_of_file(file) != entry.sha256:
            raise CheckpointError(f"{file}: damaged: its SHA-256 is not the one in the manifest; {_USE_ANOTHER}")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {_USE_ANOTHER}") from error
