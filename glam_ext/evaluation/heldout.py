"""Held-out loss of a model on a token folder: nats and perplexity per token, bits per UTF-8 byte.

    bits per byte = sum of nll over every target, end of text included, without z-loss and aux / (ln 2 * UTF-8 bytes)

Each token is predicted once; the context is reset at row starts. By default nothing is dropped for capacity
(`eval_capacity_factor` unset), because capped routing is not causal: a later token can decide whether an earlier one
keeps its expert. A capped evaluation is labelled as such.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from glam_ext.data import TokenFolder, sequential_batches
from glam_ext.distributed import Mesh
from glam_ext.model import GLaM


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """What one pass over a token folder gives."""

    total_nats: float
    num_tokens: int
    utf8_bytes: int
    capacity: str
    """How experts were capped: "no capacity limit", or "capacity factor 2"."""

    @property
    def nats(self) -> float:
        """Per token."""
        return self.total_nats / self.num_tokens

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.nats)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.total_nats / (math.log(2) * self.utf8_bytes)

    def as_dict(self) -> dict[str, float | int | str]:
        return {
            "nats": self.nats,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "num_tokens": self.num_tokens,
            "capacity": self.capacity,
        }


def evaluate(
    model: GLaM,
    data: TokenFolder,
    batch_size: int,
    stop: Callable[[], bool] | None = None,
    mesh: Mesh | None = None,
) -> HeldOutLoss | None:
    """Every row of `data` once, in batches of `batch_size` rows; the model's mode is as before afterwards.

    The ranks of a mesh share each batch and all get the result. `stop` is asked between batches and must say the same
    on every rank; None is returned when it says so. Raises ValueError if the folder has ids that the model does not
    know.
    """
    if data.manifest.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{data.folder}: has {data.manifest.vocab_size:,} token ids, the model knows {model.config.vocab_size:,}; "
            "prepare the text with the model's tokenizer"
        )
    mesh = mesh or Mesh()
    parameter = next(model.parameters())
    device = parameter.device
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            for batch in sequential_batches(data, batch_size, mesh.rank, mesh.world_size):
                if stop is not None and stop():
                    return None
                inputs, targets, weights, segment_ids = (tensor.to(device) for tensor in batch)
                real = weights != 0
                nll = model.loss(inputs, targets, weights.to(dtype), segment_ids).nll.double()
                nats += torch.ops.glam.ordered_sum(torch.where(real, nll, torch.zeros_like(nll)))
                tokens += real.sum()
    finally:
        model.train(was_training)
    mesh.sum_(nats)
    mesh.sum_(tokens)
    if int(tokens) != data.manifest.num_targets:
        raise RuntimeError(
            f"{data.folder}: expected {data.manifest.num_targets} targets as its manifest says, predicted {int(tokens)}"
        )
    factor = model.config.eval_capacity_factor or 0.0
    capped = model.config.num_moe_layers > 0 and factor > 0
    return HeldOutLoss(
        total_nats=float(nats),
        num_tokens=int(tokens),
        utf8_bytes=data.manifest.utf8_bytes,
        capacity=f"capacity factor {factor:g}" if capped else "no capacity limit",
    )
