"""Token folders: packed rows on disk, read through memory maps by Python and C++ alike.

    tokens.bin        [N, S]  inputs,      little-endian uint16 if the vocabulary has at most 65,536 ids, else uint32
    targets.bin       [N, S]  targets,     the same type
    segment_ids.bin   [N, S]  segment ids, little-endian uint16; 0 is padding, whose loss weight is 0
    manifest.json     shapes, types, sizes and SHA-256 of the files, counts, tokenizer hash, source hashes

N rows of S positions as `packing` lays them out. The targets at row ends are in no input, so both are stored and no
reader has to know the packing rule. The manifest carries a SHA-256 of itself (over its other keys as compact sorted
JSON). A folder is written under a hidden name and renamed when complete: what has its name is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glam_ext.data.atomic import atomic_folder
from glam_ext.data.corpus import Corpus
from glam_ext.data.errors import DataError
from glam_ext.data.packing import Row, pack, unpack
from glam_ext.data.tokenizer import SPECIAL_IDS, Tokenizer

FORMAT, FORMAT_VERSION = "glam-tokens", 1
ARRAYS = ("tokens", "targets", "segment_ids")
REMEDY = "make it again with glam_ext.recipes.prepare_text, or copy it again"
ROWS_PER_WRITE = 1024


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What manifest.json says. `num_targets` counts the real (weight 1) positions, one EOS per document included."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    sequence_length: int
    num_rows: int
    num_targets: int
    num_documents: int
    utf8_bytes: int
    vocab_size: int
    special_ids: dict[str, int]
    tokenizer_hash: str
    sources: list[dict[str, Any]]
    files: dict[str, dict[str, Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type of stored ids: the smaller that holds vocab_size - 1."""
    return np.dtype("<u2" if vocab_size <= 65536 else "<u4")


def write_corpus(
    folder: str | Path, corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, overwrite: bool = False
) -> Manifest:
    """Tokenise and pack a corpus into a new token folder."""
    documents = (tokenizer.encode(text) for text in corpus)
    with atomic_folder(folder, overwrite) as hidden:
        counts = _write_arrays(hidden, pack(documents, sequence_length), sequence_length, tokenizer.vocab_size)
        manifest = Manifest(
            sequence_length=sequence_length,
            num_documents=sum(record.documents for record in corpus.records),
            utf8_bytes=sum(record.utf8_bytes for record in corpus.records),
            vocab_size=tokenizer.vocab_size,
            special_ids=dict(SPECIAL_IDS),
            tokenizer_hash=tokenizer.hash,
            sources=[asdict(record) for record in corpus.records],
            **counts,
        )
        content = asdict(manifest)
        text = json.dumps({**content, "manifest_sha256": _content_hash(content)}, indent=2)
        (hidden / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return manifest


def _write_arrays(folder: Path, rows: Iterable[Row], sequence_length: int, vocab_size: int) -> dict[str, Any]:
    """Write the three files, a block of rows at a time; return the counts that only the packing knows."""
    types = {"tokens": token_dtype(vocab_size), "targets": token_dtype(vocab_size), "segment_ids": np.dtype("<u2")}
    digests = {name: hashlib.sha256() for name in ARRAYS}
    num_rows = num_targets = 0
    outputs = {name: (folder / f"{name}.bin").open("wb") for name in ARRAYS}
    try:
        for block in _blocks(rows, ROWS_PER_WRITE):
            for name, array in zip(ARRAYS, (np.stack(column) for column in zip(*block, strict=True)), strict=True):
                if name != "segment_ids" and array.max() >= vocab_size:
                    raise DataError(f"expected token ids below {vocab_size}, got {array.max()}")
                raw = array.astype(types[name]).tobytes()
                digests[name].update(raw)
                outputs[name].write(raw)
            num_rows += len(block)
            num_targets += sum(int(np.count_nonzero(row.segment_ids_S)) for row in block)
    finally:
        for output in outputs.values():
            output.close()
    files = {
        name: {
            "file": f"{name}.bin",
            "dtype": {2: "uint16", 4: "uint32"}[types[name].itemsize],
            "shape": [num_rows, sequence_length],
            "bytes": num_rows * sequence_length * types[name].itemsize,
            "sha256": digests[name].hexdigest(),
        }
        for name in ARRAYS
    }
    return {"num_rows": num_rows, "num_targets": num_targets, "files": files}


class TokenFolder:
    """A token folder opened for reading. Arrays are memory maps of shape [N, S]; nothing is loaded until it is used."""

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        """Open and check a folder. With verify, every byte is read once and compared with its hash; without, only the
        manifest and the sizes are checked. Raises DataError that names the file and the remedy."""
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder / "manifest.json")
        arrays = {name: _map_array(self.folder, name, self.manifest, verify) for name in ARRAYS}
        self.tokens, self.targets, self.segment_ids = (arrays[name] for name in ARRAYS)

    def __len__(self) -> int:
        """Number of rows N."""
        return self.manifest.num_rows

    def rows(self, indices: Sequence[int] | NDArray[np.integer]) -> Row:
        """Copies of some rows: tokens, targets and segment ids, int64 [B, S]."""
        return Row(*(array[indices].astype(np.int64) for array in (self.tokens, self.targets, self.segment_ids)))

    def documents(self) -> Iterator[NDArray[np.int64]]:
        """The documents' token ids, each with its EOS, as they were before packing."""
        return unpack(self.targets, self.segment_ids)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError if the folder was not made with this tokenizer."""
        if tokenizer.hash != self.manifest.tokenizer_hash:
            raise DataError(
                f"{self.folder}: was made with another tokenizer (hash {self.manifest.tokenizer_hash[:12]}, got "
                f"{tokenizer.hash[:12]}); use the tokenizer.model made together with it, or prepare the text again"
            )


def _read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; expected a token folder, made by glam_ext.recipes.prepare_text"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: damaged ({error}); {REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f'{path}: expected "format": "{FORMAT}"; {REMEDY}')
    if content.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: expected format version {FORMAT_VERSION}, got {content.get('format_version')}; "
            "use the glam_ext that wrote it, or prepare the text again"
        )
    found = content.pop("manifest_sha256", None)
    if found != _content_hash(content) or content.keys() != {field.name for field in fields(Manifest)}:
        raise DataError(f"{path}: damaged or edited, it does not match its own hash; {REMEDY}")
    return Manifest(**content)


def _map_array(folder: Path, name: str, manifest: Manifest, verify: bool) -> NDArray[Any]:
    entry = manifest.files[name]
    path, dtype, shape = folder / entry["file"], np.dtype(entry["dtype"]).newbyteorder("<"), tuple(entry["shape"])
    if not path.exists():
        raise DataError(f"{path}: missing; {REMEDY}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(f"{path}: expected {entry['bytes']} bytes, got {size}; {REMEDY}")
    array = np.memmap(path, dtype=dtype, mode="r", shape=shape)
    if verify and hashlib.sha256(array.data).hexdigest() != entry["sha256"]:
        raise DataError(f"{path}: damaged, its content does not match the hash in manifest.json; {REMEDY}")
    return array


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    block: list[Row] = []
    for row in rows:
        block.append(row)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block
