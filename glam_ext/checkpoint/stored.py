"""The tensors of a checkpoint folder as they lie in its files, to be read whole or in part.

Files are mapped, so opening them reads their headers only, and reading a box touches the bytes of that box.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from glam_ext import _C
from glam_ext.checkpoint.errors import CheckpointError
from glam_ext.checkpoint.folder import USE_ANOTHER, VerifiedFolder
from glam_ext.checkpoint.shards import Facts, Piece, facts_of, problem_of


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, in one file or in parts in several."""

    name: str
    parts: tuple[tuple[str, Piece], ...]
    """The file's name and the part, by file. The tensors map the files privately: writing to them changes no file."""

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0][1].tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][1].shape

    @property
    def facts(self) -> Facts:
        """Of the whole."""
        return facts_of(self.name, self.parts[0][1])._replace(offset=(0,) * len(self.shape), sizes=self.shape)

    def problem(self) -> str:
        """Why the parts do not make up the tensor, each element once; "" if they do."""
        return problem_of(self.name, [(file, facts_of(self.name, piece)) for file, piece in self.parts])

    def read(self, offset: tuple[int, ...] | None = None, sizes: tuple[int, ...] | None = None) -> Tensor:
        """The box of `sizes` that begins at `offset`, by default the whole.

        A tensor that lies whole in one file is not copied when it is read whole; everything else is memory of its own.
        """
        offset = (0,) * len(self.shape) if offset is None else offset
        sizes = self.shape if sizes is None else sizes
        if len(self.parts) == 1 and sizes == self.shape:
            return self.parts[0][1].tensor
        box = torch.empty(sizes, dtype=self.dtype)
        for _, piece in self.parts:
            begin = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
            ends = zip(offset, sizes, piece.offset, piece.tensor.shape, strict=True)
            end = [min(a + m, b + n) for a, m, b, n in ends]
            if all(b < e for b, e in zip(begin, end, strict=True)):
                box[_slices(begin, end, offset)] = piece.tensor[_slices(begin, end, piece.offset)]
        return box


def _slices(begin: list[int], end: list[int], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, origin, strict=True))


def scan_tensors(folder: VerifiedFolder, stem: str) -> dict[str, StoredTensor]:
    """The tensors of every file STEM*.safetensors, by name, whether their parts are complete or not.

    Raises CheckpointError for a file that is not a whole safetensors file or places a tensor where it cannot be.
    """
    parts: dict[str, list[tuple[str, Piece]]] = {}
    for file in folder.tensor_files(stem):
        for name, (tensor, shape, offset) in _C.read_pieces(file).items():
            parts.setdefault(name, []).append((file.name, Piece(tensor, tuple(shape), tuple(offset))))
    return {name: StoredTensor(name, tuple(found)) for name, found in parts.items()}


def stored_tensors(folder: VerifiedFolder, stem: str) -> dict[str, StoredTensor]:
    """`scan_tensors`, refusing (CheckpointError) a folder in which a tensor has a gap, an overlap or two shapes."""
    tensors = scan_tensors(folder, stem)
    for tensor in tensors.values():
        if problem := tensor.problem():
            raise CheckpointError(f"{folder.path}: {problem}; {USE_ANOTHER}")
    return tensors


def wanted_box(
    name: str, shape: tuple[int, ...], slices: tuple[slice, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and sizes of the box that `slices` cut out of a tensor; dimensions that have no slice are whole.

    Raises ValueError for a slice with a step or beyond the tensor: what is asked for is never silently cut.
    """
    wanted = slices or ()
    offset, sizes = [0] * len(shape), list(shape)
    if len(wanted) > len(shape):
        raise ValueError(f"tensor {name}: expected at most {len(shape)} slices of {list(shape)}, got {len(wanted)}")
    for dim, (part, extent) in enumerate(zip(wanted, shape, strict=False)):
        begin = 0 if part.start is None else part.start
        end = extent if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= begin <= end <= extent:
            raise ValueError(f"tensor {name}: expected a slice inside dimension {dim} of {list(shape)}, got {part}")
        offset[dim], sizes[dim] = begin, end - begin
    return tuple(offset), tuple(sizes)
