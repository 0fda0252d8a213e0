"""A checkpoint folder for another number of ranks, in one file, or in the format of torch.distributed.checkpoint.

No layout needs this to be loaded; it serves those who copy, publish or inspect checkpoints. Tensors are read and
written one by one, so the memory that is needed is that of the largest. A folder appears whole or not at all, under a
name that is free.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from glam_ext._files import fsync
from glam_ext.checkpoint import files
from glam_ext.checkpoint.errors import CheckpointError
from glam_ext.checkpoint.folder import STEMS, TRAINER, VerifiedFolder, tensor_file_name
from glam_ext.checkpoint.shards import Facts, Key, balance, file_metadata
from glam_ext.checkpoint.stored import StoredTensor, stored_tensors
from glam_ext.checkpoint.tensor_file import Record, write_tensor_file
from glam_ext.config import GLaMConfig

# An expert weight, or what an optimiser keeps of it: layers.0.moe.wi, layers.0.moe.wi.row_var.
_OF_EXPERTS = re.compile(r"(^|\.)moe\.(wi|wg|wo)(\.|$)")


def convert_checkpoint(source: VerifiedFolder, out: str | os.PathLike[str], num_ranks: int = 1) -> Path:
    """Writes the checkpoint again as `num_ranks` ranks would have saved it; returns `out`.

    Experts are split over the ranks along their first dimension, the first ranks holding one more where they do not
    divide; every other tensor goes whole to one rank, so that the files are of about the same size.

    Raises CheckpointError: `out` exists, a tensor of the source has a gap or an overlap, the disk is full. ValueError:
    num_ranks < 1.
    """
    if num_ranks < 1:
        raise ValueError(f"convert_checkpoint: expected num_ranks to be at least 1, got {num_ranks}")
    final = Path(out)
    tensors = _tensors_of(source)
    layout = _layout(source.config, tensors, num_ranks)
    stems = [stem for stem in STEMS if source.tensor_files(stem)]  # an exported model has no optimiser
    with _in_the_making(final, source.config) as temporary:
        entries = []
        for rank, boxes in enumerate(layout):
            for stem in stems:
                file = temporary / tensor_file_name(stem, rank, num_ranks)
                facts = {name: box for (of_stem, name), box in boxes.items() if of_stem == stem}
                records = {name: _record(tensors[stem, name], box) for name, box in facts.items()}
                write_tensor_file(file, records, file_metadata(facts))
                fsync(file)
                entries.append(files.entry_of(file))
        files.publish(temporary, final, entries, _trainer_text(source))
    return final


def convert_to_dcp(source: VerifiedFolder, out: str | os.PathLike[str]) -> Path:
    """Writes the checkpoint for torch.distributed.checkpoint; returns `out`.

    To be loaded with {"model": {NAME: tensor, ...}, "optimizer": {NAME: tensor, ...}}. Parts stay parts. config.json
    and trainer.json lie beside DCP's own files. Raises CheckpointError as `convert_checkpoint` does.
    """
    # Not at the top: importing it takes longer than reading a small checkpoint.
    from torch.distributed.checkpoint import CheckpointException

    from glam_ext.checkpoint.dcp import write_dcp

    final = Path(out)
    tensors = _tensors_of(source)
    with _in_the_making(final, source.config) as temporary:
        try:
            write_dcp(temporary, tensors)
        except CheckpointException as error:
            reasons = "; ".join(f"{type(reason).__name__}: {reason}" for reason, _ in error.failures.values())
            raise OSError(reasons) from error
        trainer_text = _trainer_text(source)
        if trainer_text is not None:
            files.write_text(temporary / TRAINER, trainer_text)
        for file in temporary.iterdir():
            fsync(file)
        fsync(temporary)
        os.rename(temporary, final)
        fsync(final.parent)
    return final


def _tensors_of(source: VerifiedFolder) -> dict[Key, StoredTensor]:
    return {(stem, name): tensor for stem in STEMS for name, tensor in stored_tensors(source, stem).items()}


def _trainer_text(source: VerifiedFolder) -> str | None:
    return (source.path / TRAINER).read_text(encoding="utf-8") if source.has(TRAINER) else None


@contextmanager
def _in_the_making(final: Path, config: GLaMConfig) -> Iterator[Path]:
    """A temporary folder with config.json, removed unless the block gives it its final name."""
    if final.exists() or final.is_symlink():
        raise CheckpointError(f"{final}: exists and is not replaced; choose another name or move it away")
    temporary = files.temporary_of(final)
    try:
        files.make_durable_folder(final.parent)
        shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed
        files.start(temporary, config.to_json(indent=1) + "\n")
        yield temporary
    except OSError as error:
        raise CheckpointError(
            f"{final}: the checkpoint could not be converted: {error}; make room in {final.parent} or choose another "
            "disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _record(tensor: StoredTensor, box: Facts) -> Record:
    return Record(tensor.dtype, box.sizes, lambda: tensor.read(box.offset, box.sizes))


def _layout(config: GLaMConfig, tensors: Mapping[Key, StoredTensor], num_ranks: int) -> list[dict[Key, Facts]]:
    """By rank: the box of each tensor that goes into its file."""
    boxes: list[tuple[Key, Facts, list[int]]] = []
    for key, tensor in tensors.items():
        whole = tensor.facts
        if not _is_split(config, tensor):
            boxes.append((key, whole, list(range(num_ranks))))
            continue
        for rank in range(num_ranks):
            begin, end = expert_range(config.num_experts, rank, num_ranks)
            if end > begin:
                offset, sizes = (begin, *whole.offset[1:]), (end - begin, *whole.sizes[1:])
                boxes.append((key, whole._replace(offset=offset, sizes=sizes), [rank]))
    owners = balance([(box.num_bytes, ranks) for _, box, ranks in boxes], num_ranks)
    layout: list[dict[Key, Facts]] = [{} for _ in range(num_ranks)]
    for (key, box, _), owner in zip(boxes, owners, strict=True):
        layout[owner][key] = box
    return layout


def _is_split(config: GLaMConfig, tensor: StoredTensor) -> bool:
    # An optimiser may keep something of another shape for an expert weight, a count of steps for one.
    by_expert = len(tensor.shape) > 0 and tensor.shape[0] == config.num_experts
    return by_expert and math.prod(tensor.shape) > 0 and _OF_EXPERTS.search(tensor.name) is not None


def expert_range(num_experts: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The first expert of a rank and the one after its last: contiguous, the first ranks hold one more."""
    each, more = divmod(num_experts, num_ranks)
    begin = rank * each + min(rank, more)
    return begin, begin + each + (rank < more)
