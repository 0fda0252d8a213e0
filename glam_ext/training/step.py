"""One training step's loss and gradients, summed over micro-batches and ranks.

    total = sum loss_sum / N + aux_loss_weight * (1/(M W)) sum aux + router_z_loss * sum router_z / N_real

over the M micro-batches of each of the W ranks; N_real is the number of real tokens of the whole step, N the same or
all positions, as configured. Both are known before the first backward pass, and each micro-batch's gradient is added to
the last. So M micro-batches on W ranks give the gradient of one batch (with routing groups of one sequence; a group
never crosses a micro-batch). Letters: B sequences, S positions, E experts, M micro-batches, W ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from glam_ext.data import Batch, Whole
from glam_ext.distributed import GradientReducer, Mesh
from glam_ext.model import GLaM
from glam_ext.ops import accumulate_in_place


class StepSums(NamedTuple):
    """What a step adds to the metrics: a rank's part, or with `over_ranks` the whole. On the model's device; nothing
    was copied to the host."""

    total: Tensor
    """float64 []: the differentiated loss."""
    nll: Tensor
    """float64 []: sum of the negative log-likelihood over real tokens, no z-loss and no aux."""
    aux: Tensor
    """float64 []: mean over micro-batches and ranks."""
    router_z: Tensor
    """float64 []: mean over real tokens, summed over MoE layers."""
    router_statistics: Tensor
    """int64 [MoE layers, E + 6]."""

    def over_ranks(self, mesh: Mesh) -> StepSums:
        """Summed over the ranks, the same on each; one transfer. Counts stay exact up to 2^53."""
        if mesh.world_size == 1:
            return self
        scalars = torch.stack([self.total, self.nll, self.aux, self.router_z])
        packed = mesh.sum_(torch.cat([scalars, self.router_statistics.flatten().double()]))
        statistics = packed[len(scalars) :].long().view_as(self.router_statistics)
        total, nll, aux, router_z = packed[: len(scalars)].unbind()
        return StepSums(total, nll, aux, router_z, statistics)


def count_tokens(batch: Batch) -> int:
    """Real tokens of a batch, before anything is sent to a device."""
    return int(torch.count_nonzero(batch.weights))


def micro_batches(batch: Batch, size: int) -> Iterable[Batch]:
    """Consecutive parts of `size` rows."""
    for first in range(0, len(batch.tokens), size):
        yield Batch(*(tensor[first : first + size] for tensor in batch))


def accumulate_gradients(
    model: GLaM,
    batch: Batch,
    micro_batch_size: int,
    *,
    whole: Whole | None = None,
    reducer: GradientReducer | None = None,
    denominator: str = "tokens",
    seed: int = 0,
    step: int = 0,
) -> StepSums:
    """Adds the gradient of the step's total loss to the parameters' .grad and returns this rank's part of the sums.

    whole says of what batch this one is a rank's share; absent, it is the whole. The reducer sums the gradients over
    the ranks while the last micro-batch's backward pass runs. seed, step and the position of a token in the whole batch
    are the counters of the random routing policies, so these depend neither on the micro-batch size nor on the ranks.
    Raises ValueError where micro_batch_size does not divide the batch's rows: aux is the mean over micro-batches, which
    are therefore of one size.
    """
    config = model.config
    num_rows, sequence_length = batch.tokens.shape
    if num_rows == 0:
        raise ValueError("accumulate_gradients: expected a batch of at least one row, got none")
    if micro_batch_size < 1 or num_rows % micro_batch_size:
        raise ValueError(
            "accumulate_gradients: expected micro_batch_size to divide the number of rows, got "
            f"{micro_batch_size} and {num_rows} rows"
        )
    if whole is None:
        whole = Whole(num_rows, count_tokens(batch), first_row=0)
    num_real = max(whole.num_real, 1)  # a batch of padding alone has the loss 0, not NaN
    divisor = num_real if denominator == "tokens" else whole.num_rows * sequence_length
    num_parts = whole.num_rows // micro_batch_size  # of all ranks
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    zero = torch.zeros((), dtype=torch.float64, device=device)
    parts: list[StepSums] = []
    first_token, last_token = whole.first_row * sequence_length, (whole.first_row + num_rows) * sequence_length
    for part in micro_batches(batch, micro_batch_size):
        part = Batch(*(tensor.to(device, non_blocking=True) for tensor in part))
        loss = model.loss(
            part.tokens,
            part.targets,
            part.weights.to(dtype),
            part.segment_ids,
            seed=seed,
            step=step,
            first_token=first_token,
        )
        total = loss.loss_sum / divisor
        if config.num_moe_layers:
            total = total + config.aux_loss_weight / num_parts * loss.aux
            if config.router_z_loss:
                total = total + config.router_z_loss / num_real * loss.router_z
        first_token += part.tokens.numel()
        if reducer is not None and first_token == last_token:
            reducer.start()
        with accumulate_in_place():
            total.backward()
        parts.append(
            StepSums(
                total=total.detach().double(),
                nll=torch.ops.glam.ordered_sum(torch.where(part.weights != 0, loss.nll.detach().double(), zero)),
                aux=loss.aux.detach().double() / num_parts,
                router_z=loss.router_z.detach().double() / num_real,
                router_statistics=loss.router_statistics,
            )
        )
    if reducer is not None:
        reducer.finish()
    return StepSums(*(functools.reduce(torch.add, values) for values in zip(*parts, strict=True)))
