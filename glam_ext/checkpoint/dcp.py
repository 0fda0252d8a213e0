"""Writing torch.distributed.checkpoint's format without its process group, and without assembling a tensor.

A save planner is told by DCP which state to save, plans the items to write and gives the data of each when it is asked.
This one plans one item per part of a tensor as it lies in our files, and gives the mapped part itself.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from glam_ext.checkpoint.folder import STEMS
from glam_ext.checkpoint.shards import Key, Piece
from glam_ext.checkpoint.stored import StoredTensor


def write_dcp(folder: Path, tensors: Mapping[Key, StoredTensor]) -> None:
    """Saves {"model": {NAME: tensor}, "optimizer": {NAME: tensor}} into an existing folder."""
    # DCP takes the structure of the state from tensors without data; what is written comes from the planner.
    state: dict[str, Any] = {stem: {} for stem in STEMS}
    for (stem, name), tensor in tensors.items():
        state[stem][name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as no_dist asks for
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1),
            planner=_PartsPlanner({f"{stem}.{name}": tensor for (stem, name), tensor in tensors.items()}),
            no_dist=True,
        )


class _PartsPlanner(dcp.DefaultSavePlanner):
    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__()
        self._pieces = {(name, piece.offset): piece for name, tensor in tensors.items() for _, piece in tensor.parts}

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(name, piece) for (name, _), piece in self._pieces.items()]
        return dataclasses.replace(super().create_local_plan(), items=items)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        index = write_item.index
        return self._pieces[index.fqn, tuple(index.offset or ())].tensor


def _write_item(name: str, piece: Piece) -> WriteItem:
    offset, sizes = torch.Size(piece.offset), piece.tensor.size()
    return WriteItem(
        index=MetadataIndex(name, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offset, sizes=sizes),
            properties=TensorProperties.create_from_tensor(piece.tensor),
            size=torch.Size(piece.shape),
        ),
    )
