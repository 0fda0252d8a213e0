"""What a sample is, and the numbers samples are made of.

Values depend on the sample's name only. `dtype` is x's; weights are float32 beside bfloat16 activations.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Where the ops run: samples and expected values stay on the CPU, and each call of an op takes them there and back.
DEVICE = os.environ.get("GLAM_TEST_DEVICE", "cpu")

Args = tuple[Any, ...]
Outputs = tuple[Tensor, ...]
LEVELS = ("small", "tiles", "edges", "large")


@dataclass(frozen=True)
class Sample:
    """One call: positional arguments of the schema, and which of them want gradients."""

    name: str
    args: Args
    grad: tuple[int, ...] = ()


@dataclass(frozen=True)
class Op:
    """An op, what it should equal, and its samples.

    `differentiable` are outputs; `refuses_gradients` if the others raise when a gradient arrives.
    `weights` are arguments that are rounded to the first floating argument's dtype where they enter a product.
    `reference` takes float64 arguments and returns all outputs, then the mutated arguments as they should become.
    `alone(args, i)` cuts row i out of a batch and `row(outputs, i)` is where the batch holds its result.
    `library_product_on_cuda`: torch's own product runs there, whose rows may depend on the batch.
    `has_cuda`: there are samples of the level "cuda".
    """

    name: str
    reference: Callable[..., Outputs]
    samples: Callable[[str, torch.dtype], list[Sample]]
    differentiable: tuple[int, ...] = (0,)
    refuses_gradients: bool = False
    mutated: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    alone: Callable[[Args, int], Args] | None = None
    row: Callable[[Outputs, int], Outputs] | None = None
    library_product_on_cuda: bool = False
    has_cuda: bool = False

    def __call__(self, *args: Any) -> Any:
        return self.on_device(self.raw, *args)

    @property
    def raw(self) -> Callable[..., Any]:
        """The op itself, for arguments that are where it runs."""
        return getattr(torch.ops.glam, self.name)

    def on_device(self, call: Callable[..., Any], *args: Any) -> Any:
        """call(*args) where the ops run, its results and the mutated arguments brought back."""
        if DEVICE == "cpu":
            return call(*args)
        moved = on_device(args)
        result = call(*moved)
        for index in self.mutated:
            args[index].copy_(moved[index])
        return result.cpu() if isinstance(result, Tensor) else tuple(part.cpu() for part in result or ())

    def find(self, level: str, dtype: torch.dtype, name: str) -> Sample:
        (found,) = [s for s in self.samples(level, dtype) if s.name == name]
        return found


def on_device(args: Args) -> Args:
    return tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)


def generator_of(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def randn(name: str, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=generator_of(name), dtype=torch.float64)).to(dtype)


def randint(name: str, high: int, *shape: int, dtype: torch.dtype = torch.int64, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=generator_of(name), dtype=dtype)


def uniform(name: str, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator_of(name), dtype=torch.float32)


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """Parameters stay float32 beside activations of 16 bits."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def one_output(function: Callable[..., Tensor]) -> Callable[..., Outputs]:
    return lambda *args: (function(*args),)


def first_dim_row(outputs: Outputs, i: int) -> Outputs:
    return tuple(output[i : i + 1] for output in outputs)
