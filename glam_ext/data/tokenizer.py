"""SentencePiece with the settings that give back every text exactly.

Identity normalisation, no dummy prefix, no removal of spaces and byte fallback make decode(encode(text)) == text for
any Unicode text: leading and repeated white space, CRLF, NUL, emoji. One character needs help: SentencePiece writes a
space as U+2581 inside its pieces, so a U+2581 of the text would come back as a space; here it becomes its three bytes.

Pieces: pad 0, eos 1, bos 2, unk 3 (never produced), line feed 4, 256 bytes, then what was learned. Pieces never span
white space or lines. BPE is the default because its ids are the same in every SentencePiece version tried, Python or
C++; Unigram breaks ties differently and depends on the number of training threads.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from glam_ext.data.errors import DataError

PAD, EOS, BOS, UNK = 0, 1, 2, 3
SPECIAL_IDS = {"pad": PAD, "eos": EOS, "bos": BOS, "unk": UNK}
MIN_VOCAB_SIZE = 4 + 1 + 256
FORMAT_VERSION = 1
SPACE_SYMBOL = "\u2581"
# The trainer sees lines, cut at this many characters: it works within words, and drops what exceeds a limit in bytes.
TRAINING_LINE = 1000


class Tokenizer:
    """Text to token ids and back. Make one with `Tokenizer.train` or `Tokenizer.load`."""

    def __init__(self, model: bytes) -> None:
        """Use a serialised SentencePiece model. Raises DataError if it is damaged or not made the way `train` does."""
        self.model = model
        try:
            self._processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"damaged tokenizer model: {error}; train or copy it again") from error
        processor = self._processor
        found = {
            "pad": processor.pad_id(),
            "eos": processor.eos_id(),
            "bos": processor.bos_id(),
            "unk": processor.unk_id(),
        }
        if found != SPECIAL_IDS:
            raise DataError(
                f"tokenizer: expected the special ids {SPECIAL_IDS}, got {found}; train it with Tokenizer.train"
            )
        self._space_symbol_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode("utf-8")]
        self.hash = self._hash()

    @classmethod
    def train(
        cls,
        documents: Iterable[str],
        vocab_size: int,
        kind: Literal["bpe", "unigram"] = "bpe",
        character_coverage: float = 0.9995,
    ) -> Tokenizer:
        """Learn a vocabulary of exactly `vocab_size` pieces. The same documents give the same pieces and scores.

        Characters beyond `character_coverage` of the text are left to byte fallback. Raises DataError if the text is
        empty or too small for the vocabulary, or the vocabulary too small for the text's characters.
        """
        if kind not in ("bpe", "unigram"):
            raise DataError(f"tokenizer: expected kind bpe or unigram, got {kind}")
        if vocab_size <= MIN_VOCAB_SIZE:
            raise DataError(
                f"tokenizer: expected a vocabulary above {MIN_VOCAB_SIZE} (special pieces and bytes), got {vocab_size}"
            )
        lines = _training_lines(documents)
        first = next(lines, None)
        if first is None:
            raise DataError("tokenizer: expected some text to train on, the corpus is empty")
        model = io.BytesIO()
        try:
            _sentencepiece().SentencePieceTrainer.train(
                sentence_iterator=_chain(first, lines),
                model_writer=model,
                vocab_size=vocab_size,
                model_type=kind,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                pad_id=PAD,
                eos_id=EOS,
                bos_id=BOS,
                unk_id=UNK,
                max_sentence_length=8 * TRAINING_LINE,
                shuffle_input_sentence=False,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = str(error).rsplit("] ", 1)[-1]
            raise DataError(f"tokenizer: cannot make {vocab_size} pieces from this text: {reason}") from error
        return cls(model.getvalue())

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without bos and eos. Raises DataError for half a surrogate pair."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"text cannot be written as UTF-8: {error}; drop the lone surrogate") from error
        ids: list[int] = []
        for index, part in enumerate(text.split(SPACE_SYMBOL)):
            if index:
                ids.extend(self._space_symbol_ids)
            ids.extend(self._processor.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; pad, bos and eos vanish, an incomplete UTF-8 sequence shows as U+FFFD."""
        ids = [int(token) for token in ids]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise DataError(f"tokenizer: expected ids in [0, {self.vocab_size}), got {token}")
        return self._processor.decode(ids)

    def describe(self) -> str:
        """JSON that says what the model is: its vocabulary size, special ids and hash."""
        description = {
            "format": "glam-tokenizer",
            "format_version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "special_ids": SPECIAL_IDS,
            "hash": self.hash,
        }
        return json.dumps(description, indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the model (`path`, ends in .model) and a .json beside it that says what it is."""
        path = Path(path)
        path.write_bytes(self.model)
        path.with_suffix(".json").write_text(self.describe(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises DataError if a file is missing, damaged, or the two do not belong together."""
        path = Path(path)
        description_path = path.with_suffix(".json")
        try:
            model, description = path.read_bytes(), json.loads(description_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename}: no such file; a tokenizer is a .model file and a .json beside it"
            ) from error
        except ValueError as error:
            raise DataError(f"{description_path}: damaged ({error}); train or copy the tokenizer again") from error
        if not isinstance(description, dict) or description.get("format") != "glam-tokenizer":
            raise DataError(f"{description_path}: does not describe a tokenizer; train or copy it again")
        version = description.get("format_version")
        if version != FORMAT_VERSION:
            raise DataError(
                f"{description_path}: expected format version {FORMAT_VERSION}, got {version}; "
                "use the glam_ext that wrote it"
            )
        try:
            tokenizer = cls(model)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if tokenizer.hash != description.get("hash"):
            raise DataError(
                f"{path}: its pieces do not match the hash in {description_path.name}; train or copy both again"
            )
        return tokenizer

    def check_hash(self, expected: str | None, name: str | Path) -> None:
        """Raise DataError unless this is the tokenizer of a model trained with hash `expected` (None: not recorded)."""
        if expected is not None and expected != self.hash:
            raise DataError(
                f"{name}: is not the tokenizer that the model was trained with (hash {self.hash[:12]}, expected "
                f"{expected[:12]}); use the one of its training data"
            )

    def _hash(self) -> str:
        """SHA-256 over the pieces, scores and kinds: what decides the ids, and nothing that differs between runs."""
        digest = hashlib.sha256()
        processor = self._processor
        for index in range(processor.get_piece_size()):
            piece = processor.id_to_piece(index).encode("utf-8")
            kind = (
                processor.is_control(index)
                | processor.is_unknown(index) << 1
                | processor.is_byte(index) << 2
                | processor.is_unused(index) << 3
            )
            digest.update(struct.pack("<IfB", len(piece), processor.get_score(index), kind) + piece)
        return digest.hexdigest()


def _training_lines(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for line in text.replace(SPACE_SYMBOL, "\n").split("\n"):
            for start in range(0, len(line), TRAINING_LINE):
                yield line[start : start + TRAINING_LINE]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ModuleNotFoundError:
        raise ImportError("glam_ext.data: text needs SentencePiece; pip install 'glam_ext[data]'") from None
    return sentencepiece
