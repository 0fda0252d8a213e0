"""GradientReducer: gradients summed over ranks while the backward pass is still at work. The work is C++."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from glam_ext import _C

if TYPE_CHECKING:
    from glam_ext.distributed.mesh import Mesh
    from glam_ext.model import GLaM

BUCKET_BYTES = 8 << 20


class GradientReducer:
    """Sums gradients over process groups, in buckets, as a backward pass completes them.

        reducer = GradientReducer((parameter, group) for ...)
        for part in micro_batches[:-1]:
            loss(part).backward()      # accumulates here, sends nothing
        reducer.start()
        loss(micro_batches[-1]).backward()
        reducer.finish()               # every .grad is the sum over its group

    Args:
        parameters: each with the name of its group ("" leaves its gradient alone), in the order of the forward pass
            and the same on every rank. Those that need no gradient are left out. Convert them (.to) before.
        bucket_bytes: how much travels at once; a gradient of at least that size is summed where it is.

    These are sums: divide the loss by what all ranks have together. Stock DistributedDataParallel divides by the ranks
    instead and needs no reducer. Raises RuntimeError in `finish` where a rank is gone.
    """

    def __init__(self, parameters: Iterable[tuple[Tensor, str]], bucket_bytes: int = BUCKET_BYTES) -> None:
        wanted = [(parameter, group) for parameter, group in parameters if parameter.requires_grad]
        self._core = _C.GradientReducer(wanted, bucket_bytes)

    @classmethod
    def of_model(cls, model: GLaM, mesh: Mesh, bucket_bytes: int = BUCKET_BYTES) -> GradientReducer:
        """For a model whose experts are spread over the mesh's expert axis: their gradients are summed over the ranks
        that hold the same experts, all others over all ranks."""
        experts = model.expert_parameters()
        return cls(
            (
                (parameter, mesh.group_name("data" if name in experts else "world"))
                for name, parameter in model.named_parameters()
            ),
            bucket_bytes,
        )

    def start(self) -> None:
        """Before the last backward pass of a step."""
        self._core.start()

    def finish(self) -> None:
        """After it."""
        self._core.finish()
