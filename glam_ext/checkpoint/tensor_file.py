"""Writing a safetensors file tensor by tensor: no second copy of a model is ever held, on any device.

Layout: the length of the header (8 bytes), the header (JSON), the tensors' bytes without gaps. The order is that of the
reference implementation: wide dtypes first and by name within one, so that every tensor is aligned.
Source: the format description in the safetensors repository (huggingface/safetensors).
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

# What the C++ reader knows, in the order of the reference.
DTYPE_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: position for position, dtype in enumerate(DTYPE_NAMES)}
_METADATA_KEY = "__metadata__"
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Record:
    """A tensor to be written; `read` is called when its turn comes and may give any device and any strides."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    read: Callable[[], Tensor]


def check_name_and_dtype(name: str, dtype: torch.dtype) -> None:
    """Raises ValueError for what a safetensors file cannot hold."""
    if dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(f"tensor {name}: expected one of the dtypes {known}, got {dtype}; convert it first")
    if name == _METADATA_KEY:
        raise ValueError(f"expected any other name of a tensor, got {name}, which safetensors keeps for itself")


def write_tensor_file(file: Path, records: Mapping[str, Record], metadata: Mapping[str, str]) -> None:
    """Writes the tensors under their names, and `metadata` as the file's own texts. Does not sync.

    Raises OSError, and ValueError for a name or dtype that safetensors does not have.
    """
    header: dict[str, object] = {_METADATA_KEY: dict(metadata)}
    position = 0
    names = sorted(records, key=lambda name: (_ORDER.get(records[name].dtype, 0), name))
    for name in names:
        record = records[name]
        check_name_and_dtype(name, record.dtype)
        end = position + math.prod(record.sizes) * record.dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[record.dtype],
            "shape": list(record.sizes),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for name in names:
            record = records[name]
            tensor = record.read().detach()
            assert (tensor.dtype, tuple(tensor.shape)) == (record.dtype, record.sizes), name
            stream.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
