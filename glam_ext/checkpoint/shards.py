"""Parts of tensors on several ranks: what each holds, whether together it is everything, and who writes what.

A part is a box of a whole tensor: the whole's shape, the offset of the part's first element, its own sizes. The ranks
tell each other these numbers and never a tensor. A part that several ranks hold (a replica) is written by one of them.
Whether parts make up a whole is decided by the C++ core, for saving and for both readers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from glam_ext import _C
from glam_ext.checkpoint.errors import CheckpointError
from glam_ext.checkpoint.tensor_file import DTYPE_NAMES, check_name_and_dtype
from glam_ext.config import GLaMConfig

_ITEM_SIZES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}
_GIVE_PIECES = (
    "give save_checkpoint on every rank all that it holds, a part as a Piece with the shape of the whole tensor and "
    "the part's offset"
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a tensor, as one rank holds it; it may be empty."""

    tensor: Tensor
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Of the part's first element in the whole."""


class Facts(NamedTuple):
    """A part without its data."""

    dtype: str
    """As safetensors writes it: "F32"."""
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return self.sizes == self.shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * _ITEM_SIZES[self.dtype]


# "model" or "optimizer", and the tensor's name.
Key = tuple[str, str]


def as_piece(value: Tensor | Piece) -> Piece:
    """A plain tensor is whole."""
    if isinstance(value, Piece):
        return value
    return Piece(value, tuple(value.shape), (0,) * value.dim())


def facts_of(name: str, value: Tensor | Piece) -> Facts:
    """Raises ValueError for a name or dtype that a checkpoint cannot hold."""
    piece = as_piece(value)
    check_name_and_dtype(name, piece.tensor.dtype)
    dtype = DTYPE_NAMES[piece.tensor.dtype]
    return Facts(dtype, tuple(piece.shape), tuple(piece.offset), tuple(piece.tensor.shape))


def problem_of(name: str, holders: Iterable[tuple[str, Facts]]) -> str:
    """Why these parts, each with the name of who has it, are not exactly one whole tensor; "" if they are."""
    return _C.problem_of_pieces(name, [(holder, *facts) for holder, facts in holders])


def model_shapes(config: GLaMConfig) -> dict[str, tuple[int, ...]]:
    """The model's tensors by name, whole; nothing is allocated."""
    return {name: tuple(p.shape) for name, p in _C.GLaM(config.to_json(), None, "meta").named_parameters()}


def check_model_shapes(config: GLaMConfig, holdings: Sequence[Mapping[Key, Facts]]) -> None:
    """Raises CheckpointError where a rank says another whole shape than the configuration does.

    Ranks that give their own experts as plain tensors of one shape look like replicas; all but one would be lost.
    """
    expected = model_shapes(config)
    for rank, holding in enumerate(holdings):
        for (stem, name), facts in holding.items():
            shape = expected.get(name, facts.shape)
            if stem == "model" and facts.shape != shape:
                raise CheckpointError(
                    f"model tensor {name}: expected the whole shape {list(shape)} of the configuration, got "
                    f"{list(facts.shape)} on rank {rank}; {_GIVE_PIECES}"
                )


def file_metadata(facts: Mapping[str, Facts]) -> dict[str, str]:
    """The metadata of a file with these parts, which makes it readable without any other file."""
    places = {name: {"shape": part.shape, "offset": part.offset} for name, part in facts.items() if not part.is_whole}
    return {"format": "pt", **({_C.PIECES_KEY: json.dumps(places)} if places else {})}


def balance(items: Sequence[tuple[int, Sequence[int]]], num_ranks: int) -> list[int]:
    """A rank for each item (bytes, ranks it may go to), so that the ranks' sums of bytes differ little.

    Depends on the arguments alone, so every rank comes to the same result.
    """
    load = [0] * num_ranks
    chosen = [0] * len(items)
    # Those without a choice first, then the large ones, so that the small ones even out what is left.
    for index in sorted(range(len(items)), key=lambda index: (len(items[index][1]) > 1, -items[index][0], index)):
        size, candidates = items[index]
        chosen[index] = min(candidates, key=lambda rank: (load[rank], rank))
        load[chosen[index]] += size
    return chosen


def share_out(holdings: Sequence[Mapping[Key, Facts]]) -> list[set[Key]]:
    """By rank: which of its own parts it writes, given what each rank holds.

    Raises CheckpointError, naming the tensor, unless the distinct parts of every tensor make it up: each element once,
    one dtype, one shape.
    """
    holders: dict[Key, dict[Facts, list[int]]] = {}
    for rank, holding in enumerate(holdings):
        for key, facts in holding.items():
            parts = holders.setdefault(key, {})
            # A rank may have no share of a tensor (more ranks than experts); that is nothing to write.
            if math.prod(facts.sizes) > 0 or math.prod(facts.shape) == 0:
                parts.setdefault(facts, []).append(rank)
    for (stem, name), parts in holders.items():
        problem = problem_of(name, [(_show_ranks(ranks), facts) for facts, ranks in parts.items()])
        if problem:
            raise CheckpointError(f"{stem} {problem}; {_GIVE_PIECES}")
    candidates = [(key, facts.num_bytes, ranks) for key, parts in holders.items() for facts, ranks in parts.items()]
    writers = balance([(size, ranks) for _, size, ranks in candidates], len(holdings))
    shares: list[set[Key]] = [set() for _ in holdings]
    for (key, _, _), writer in zip(candidates, writers, strict=True):
        shares[writer].add(key)
    return shares


def _show_ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
