"""Documents of text, out of plain files, JSON lines and the corpus that comes with the package.

A source is a path or a name:
    FILE.txt, FILE.txt.xz       the whole file is one document
    FILE.jsonl, FILE.jsonl.xz   one JSON object per line, its "text" is one document; other keys are ignored
    austen, austen:heldout      Jane Austen's novels: five for training, "Persuasion" held out (data/austen/README.md)

The text is taken as it is: no newline translation, no stripping, no Unicode normalisation. Documents without any
character are skipped. What cannot be read is an error that names the file and the line.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from glam_ext.data.errors import DataError

AUSTEN_FOLDER = Path(__file__).parent / "austen"
AUSTEN = {
    "austen": ("sense_and_sensibility", "pride_and_prejudice", "mansfield_park", "emma", "northanger_abbey"),
    "austen:heldout": ("persuasion",),
}
SUFFIXES = (".txt", ".jsonl", ".txt.xz", ".jsonl.xz")


@dataclass(frozen=True)
class SourceRecord:
    """What was read from one file. `sha256` is of its uncompressed bytes, `utf8_bytes` counts the documents' text."""

    name: str
    sha256: str
    documents: int
    utf8_bytes: int


class Corpus:
    """An iterable of documents (str) from several sources, in the order given; it can be iterated again and again."""

    def __init__(self, sources: Sequence[str | Path]) -> None:
        """Resolve names and look for the files. Raises DataError for an unknown name, a missing file, or no source."""
        if not sources:
            raise DataError("a corpus needs at least one source: a file or the name austen")
        self.files = [file for source in sources for file in _resolve(source)]
        self._records: list[SourceRecord] | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the documents. Raises DataError where a file is damaged, and at the end if there was no document."""
        records = []
        for name, file in self.files:
            sha256, documents, utf8_bytes = hashlib.sha256(), 0, 0
            for text, raw in _read(name, file):
                sha256.update(raw)
                if text:
                    documents += 1
                    utf8_bytes += len(text.encode("utf-8"))
                    yield text
            records.append(SourceRecord(name, sha256.hexdigest(), documents, utf8_bytes))
        if not any(record.documents for record in records):
            raise DataError(f"{', '.join(name for name, _ in self.files)}: empty corpus, expected some text")
        self._records = records

    @property
    def records(self) -> list[SourceRecord]:
        """One record per file, known once the corpus has been read to its end."""
        if self._records is None:
            raise DataError("the corpus has not been read to its end yet")
        return self._records


def _resolve(source: str | Path) -> list[tuple[str, Path]]:
    """The (name, path) of every file that a source stands for."""
    name = str(source)
    if name in AUSTEN:
        return [(f"austen/{novel}.txt", AUSTEN_FOLDER / f"{novel}.txt.xz") for novel in AUSTEN[name]]
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{name}: is a folder; name the files in it, for instance {name}/*.txt")
    if not path.exists():
        raise DataError(f"{name}: no such file, and not one of the names {', '.join(AUSTEN)}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{name}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    return [(name, path)]


def _read(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (document, the bytes it was read from); the document is empty for an empty file or a blank line."""
    with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as file:
        try:
            read = _read_lines if path.name.removesuffix(".xz").endswith(".jsonl") else _read_text
            yield from read(name, file)
        except (lzma.LZMAError, EOFError) as error:
            raise DataError(f"{name}: truncated or damaged xz file ({error}); make or copy it again") from error


def _read_text(name: str, file: BinaryIO | lzma.LZMAFile) -> Iterator[tuple[str, bytes]]:
    raw = file.read()
    yield _decode(name, raw, first_line=1), raw


def _read_lines(name: str, file: BinaryIO | lzma.LZMAFile) -> Iterator[tuple[str, bytes]]:
    for number, raw in enumerate(file, start=1):
        line = _decode(name, raw, first_line=number)
        text = _text_of(f"{name}: line {number}", line) if line.strip() else ""
        yield text, raw


def _decode(name: str, raw: bytes, first_line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{name}: line {line}: expected UTF-8, found byte 0x{raw[error.start]:02X} ({error.reason}); "
            "convert the file, for instance with iconv -f LATIN1 -t UTF-8"
        ) from error


def _text_of(where: str, line: str) -> str:
    """The document in one JSON line."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f'{where}: expected a JSON object {{"text": ...}}: {error.msg}, column {error.colno}; mend it'
        ) from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: expected a JSON object with a string under "text", got {line.strip()[:60]}; mend it')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text has half of a surrogate pair (\\u{ord(text[error.start]):04x}) which UTF-8 "
            "cannot hold; write the whole pair or drop it"
        ) from error
    return text
