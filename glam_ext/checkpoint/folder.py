"""Names, manifest and verification of a checkpoint folder, and the search for the newest good one.

A folder is good when COMPLETE exists, manifest.json is sound, every file it lists is there with its size (and its
SHA-256 when asked), and config.json is a valid configuration. Files it does not list are never read. The C++ side
(glam/checkpoint.h) applies the same rules. Several ranks share the work of hashing and come to one result.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glam_ext.checkpoint.errors import CheckpointError, first_only, together
from glam_ext.checkpoint.shards import balance
from glam_ext.config import GLaMConfig
from glam_ext.distributed.ranks import ONE_PROCESS, Ranks

FORMAT = "glam-checkpoint"
VERSION = 1
MARKER = "COMPLETE"
MANIFEST = "manifest.json"
CONFIG = "config.json"
TRAINER = "trainer.json"
# The two kinds of tensor files begin with these.
STEMS = ("model", "optimizer")
TENSOR_SUFFIX = ".safetensors"
# Everything under such a name is unfinished or about to be deleted, and is removed by the next save.
TEMPORARY_PREFIX = ".tmp-"

_STEP_NAME = re.compile(r"step-([0-9]{1,18})", re.ASCII)
_PLAIN_NAME = re.compile(r"[^./\\\0][^/\\\0]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
# The remedy in most messages.
USE_ANOTHER = "use another checkpoint or copy this one again from its source"
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

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files)

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


def tensor_file_name(stem: str, rank: int, num_ranks: int) -> str:
    return f"{stem}{TENSOR_SUFFIX}" if num_ranks == 1 else f"{stem}-{rank + 1:05d}-of-{num_ranks:05d}{TENSOR_SUFFIX}"


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
    return _verify_share(Path(folder), hashes, ONE_PROCESS)


def find_checkpoint(path: str | os.PathLike[str], hashes: bool = True, *, ranks: Ranks = ONE_PROCESS) -> VerifiedFolder:
    """Opens a checkpoint folder, or the newest good one of a run folder or of its checkpoints/ folder.

    A damaged or half-written folder is skipped with a warning that names it while searching, and refused
    (:class:`CheckpointError`) when it is the folder that was named.

    Every rank of `ranks` calls this. Each hashes a part of the files, and a folder is good if every rank finds it good,
    so all open the same one or all raise; rank 0 warns.
    """
    folder = Path(path)
    candidates = ranks.all_gather(together(ranks, lambda: _candidates(folder), _cannot_read(folder)))[0]
    is_named = candidates == ["."]
    refused: list[str] = []
    for name in candidates:
        candidate = folder if is_named else folder / name
        try:
            return _verify_by_all(candidate, hashes, ranks)
        except CheckpointError as error:
            if is_named:
                raise
            refused.append(str(error))
            message = f"skipping a checkpoint: {error}"
            # Where the user made warnings errors, this is one, and then on every rank.
            warn = first_only(ranks, functools.partial(warnings.warn, message, stacklevel=4))
            together(ranks, warn, _cannot_read(folder))
    root = search_root(folder)
    if not refused:
        raise CheckpointError(f"{root}: has no checkpoint (no folder called step-000123); check the path")
    raise CheckpointError(f"{root}: has no usable checkpoint; each was refused:\n  " + "\n  ".join(refused))


def search_root(folder: Path) -> Path:
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def looks_like_checkpoint(path: Path) -> bool:
    return step_of(path) is not None or (path / MANIFEST).is_file() or (path / MARKER).is_file()


def _candidates(folder: Path) -> list[str]:
    """Paths relative to `folder`, the newest first; "." if it is a checkpoint itself."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; give the path of a checkpoint folder or of a run folder")
    if looks_like_checkpoint(folder):
        return ["."]
    return [str(candidate.relative_to(folder)) for candidate in step_folders(search_root(folder))]


def _cannot_read(path: Path) -> Callable[[OSError], str]:
    return lambda error: f"{path}: cannot be read ({error}); {USE_ANOTHER}"


def _verify_by_all(folder: Path, hashes: bool, ranks: Ranks) -> VerifiedFolder:
    verified = together(ranks, lambda: _verify_share(folder, hashes, ranks), _cannot_read(folder))
    views = ranks.all_gather(hashlib.sha256(repr((verified.files, verified.config)).encode()).hexdigest())
    if len(set(views)) > 1:
        raise CheckpointError(
            f"{folder}: the ranks see different folders; put it on a file system that all ranks share"
        )
    return verified


def _verify_share(path: Path, hashes: bool, ranks: Ranks) -> VerifiedFolder:
    """Everything but the content of the files that other ranks hash."""
    entries = read_entries(path)
    hashed_by = balance([(entry.size, range(ranks.world_size)) for entry in entries], ranks.world_size)
    for entry, rank in zip(entries, hashed_by, strict=True):
        check_file(path / entry.file, entry, hashes and rank == ranks.rank)
    return VerifiedFolder(path, read_config(path), entries)


def read_entries(path: Path) -> tuple[ManifestEntry, ...]:
    """The manifest of a folder that has a marker; raises CheckpointError."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a folder; give the path of a checkpoint folder")
    if not (path / MARKER).is_file():
        raise CheckpointError(f"{path}: half-written: it has no COMPLETE marker; {USE_ANOTHER}")
    return _read_manifest(path / MANIFEST)


def read_config(path: Path) -> GLaMConfig:
    """Raises CheckpointError."""
    try:
        return GLaMConfig.from_json(_read_text(path / CONFIG))
    except ValueError as error:
        raise CheckpointError(f"{path / CONFIG}: {error}; if a newer glam_ext wrote it, use that version") from error


def manifest_text(entries: list[ManifestEntry]) -> str:
    files = [dataclasses.asdict(entry) for entry in entries]
    return json.dumps({"format": FORMAT, "version": VERSION, "files": files}, indent=1) + "\n"


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {USE_ANOTHER}") from error


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError(f"a key is given twice in {keys}; remove one")
    return dict(pairs)


def _read_manifest(file: Path) -> tuple[ManifestEntry, ...]:
    def damaged(what: str) -> RuntimeError:
        return CheckpointError(f"{file}: damaged: {what}; {USE_ANOTHER}")

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


def check_file(file: Path, entry: ManifestEntry, hashes: bool) -> None:
    """Raises CheckpointError unless the file is as the manifest says; its content counts if `hashes`."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; {USE_ANOTHER}")
        size = file.stat().st_size
        if size != entry.size:
            raise CheckpointError(
                f"{file}: damaged: it has {size} bytes, the manifest says {entry.size}; {USE_ANOTHER}"
            )
        if hashes and sha256_of_file(file) != entry.sha256:
            raise CheckpointError(f"{file}: damaged: its SHA-256 is not the one in the manifest; {USE_ANOTHER}")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); {USE_ANOTHER}") from error
