"""Documents of token ids to rows of fixed length S.

A document t_1 .. t_n is the list of targets t_1 .. t_n, EOS. The lists are laid end to end into rows of S positions;
where a document meets the end of a row it is cut. Each piece is a segment of its own, which starts from BOS:

    inputs   BOS  a_1 .. a_{m-1}      (the piece's targets, shifted by one)
    targets  a_1  a_2 .. a_m          (a_m = EOS in the last piece of a document only)

So every token and one EOS per document is predicted exactly once, the context is reset at every row start, and only the
end of the last row is padding. Segment ids count 1, 2, ... within a row; 0 is padding (input and target PAD, weight 0).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glam_ext.data.tokenizer import BOS, EOS, PAD

MAX_SEQUENCE_LENGTH = 65535  # segment ids of a row are stored in 16 bits


class Row(NamedTuple):
    """One packed row: three int64 arrays of shape [S]."""

    tokens_S: NDArray[np.int64]
    targets_S: NDArray[np.int64]
    segment_ids_S: NDArray[np.int64]


def pack(documents: Iterable[Sequence[int] | NDArray[np.integer]], sequence_length: int) -> Iterator[Row]:
    """Yield the rows of the documents, in order. Ids of PAD, EOS or BOS inside a document are refused."""
    if not 1 <= sequence_length <= MAX_SEQUENCE_LENGTH:
        raise ValueError(f"pack: expected sequence_length in [1, {MAX_SEQUENCE_LENGTH}], got {sequence_length}")
    row, used, segment = _empty_row(sequence_length), 0, 0
    for document in documents:
        ids = np.asarray(document, dtype=np.int64)
        if np.isin(ids, (PAD, EOS, BOS)).any():
            raise ValueError("pack: expected documents without pad, eos and bos ids; packing adds them")
        remaining = np.append(ids, EOS)
        while remaining.size:
            piece = remaining[: sequence_length - used]
            remaining = remaining[piece.size :]
            end, segment = used + piece.size, segment + 1
            row.tokens_S[used] = BOS
            row.tokens_S[used + 1 : end] = piece[:-1]
            row.targets_S[used:end] = piece
            row.segment_ids_S[used:end] = segment
            used = end
            if used == sequence_length:
                yield row
                row, used, segment = _empty_row(sequence_length), 0, 0
    if used:
        yield row


def unpack(targets: NDArray[np.integer], segment_ids: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """The documents (each with its EOS) that were packed into rows [N, S]: the inverse of `pack`."""
    stream = targets[segment_ids != 0].astype(np.int64)
    ends = np.flatnonzero(stream == EOS) + 1
    yield from np.split(stream, ends)[:-1]


def _empty_row(sequence_length: int) -> Row:
    return Row(
        np.full(sequence_length, PAD, np.int64),
        np.full(sequence_length, PAD, np.int64),
        np.zeros(sequence_length, np.int64),
    )
