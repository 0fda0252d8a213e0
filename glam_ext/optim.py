"""Optimisation as GLaM does it: Adafactor over the C++ ops, learning rates, the gradient's norm and health.

Adafactor follows Shazeer and Stern (arXiv 1804.04235) with the settings of lingvo's XLAShardingAdafactor: no momentum,
decay 1 - (t + 1)^-0.8 at the 0-based update t, update clipping at RMS 1, steps relative to max(RMS(weight), 1e-3).
Nothing here copies from the device to the host: the count of applied updates, the learning rate and the flag that skips
an update are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

import glam_ext  # noqa: F401  (registers torch.ops.glam)

Schedule = Callable[[Tensor], Tensor]


# --- learning rates of the 0-based step: a number gives a float, a tensor a float64 tensor on its device


@overload
def glam_schedule(step: int, multiplier: float = 1.0, constant_steps: int = 10_000) -> float: ...
@overload
def glam_schedule(step: Tensor, multiplier: float = 1.0, constant_steps: int = 10_000) -> Tensor: ...
def glam_schedule(step: int | Tensor, multiplier: float = 1.0, constant_steps: int = 10_000) -> float | Tensor:
    """multiplier / sqrt(max(step, constant_steps)): constant, then the inverse square root; no warm-up."""
    if isinstance(step, Tensor):
        return step.clamp(min=constant_steps).double().rsqrt() * multiplier
    return multiplier / math.sqrt(max(step, constant_steps))


def warmup_factor(step: int, warmup_steps: int) -> float:
    """(step + 1) / warmup_steps up to 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def cosine_schedule(
    step: int, peak: float, total_steps: int, warmup_steps: int = 0, final_fraction: float = 0.0
) -> float:
    """Linear warm-up to `peak`, then half a cosine down to final_fraction * peak at `total_steps`, and constant."""
    if step < warmup_steps:
        return peak * warmup_factor(step, warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(total_steps - warmup_steps, 1))
    return peak * (final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def inverse_sqrt_schedule(step: int, peak: float, warmup_steps: int = 1) -> float:
    """Linear warm-up to `peak`, then peak * sqrt(warmup_steps / (step + 1))."""
    start = max(warmup_steps, 1)
    return peak * min((step + 1) / start, math.sqrt(start / (step + 1)))


# --- parameters of which a rank holds a part


@dataclass(frozen=True)
class Shard:
    """A parameter holds a part of the whole along one dimension, the ranks of a process group hold the others."""

    dim: int
    """Counted from the end: -1 is the last."""
    size: int
    """Of the whole parameter in that dimension."""
    group: str
    """The name of the process group."""


Shards = Mapping[Tensor, Sequence[Shard]]


def _sum_over_groups(items: Iterable[tuple[Tensor, Sequence[str]]]) -> None:
    """Replaces each tensor by its sum over each of its groups; one transfer for each group and dtype."""
    batches: dict[tuple[str, torch.dtype], list[Tensor]] = {}
    for tensor, groups in items:
        for group in groups:
            batches.setdefault((group, tensor.dtype), []).append(tensor)
    for (group, _), tensors in batches.items():
        total = torch.ops.glam.ordered_all_reduce(torch.cat([tensor.flatten() for tensor in tensors]), group)
        for tensor, part in zip(tensors, total.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


# --- the gradient's norm and health


class GradientStatistics(NamedTuple):
    norm: Tensor
    """float64 []: the root of the sum of all squares, added in a fixed order."""
    nonfinite: Tensor
    """bool []: a gradient, or its square in its dtype (float32 for bfloat16), is infinite or NaN."""


def gradient_statistics(parameters: Iterable[Tensor], shards: Shards | None = None) -> GradientStatistics:
    """Norm and health of the parameters' gradients in one pass; those without a gradient are left out.

    With `shards` they are those of the whole parameters, each counted once, and the same bits on every rank; the ranks
    of the groups must all make the call.
    """
    by_groups: dict[tuple[str, ...], list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups = tuple(shard.group for shard in (shards or {}).get(parameter, ()))
            by_groups.setdefault(groups, []).append(parameter.grad)
    if not by_groups:
        return GradientStatistics(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.bool))
    grads = [grad for some in by_groups.values() for grad in some]
    counts = [len(some) for some in by_groups.values()]
    parts = zip(*(found.split(counts) for found in torch.ops.glam.squared_norm(grads)), strict=True)
    vectors = [torch.stack([torch.ops.glam.ordered_sum(squares), bad.any().double()]) for squares, bad in parts]
    _sum_over_groups(zip(vectors, by_groups, strict=True))
    squares, bad = vectors[0].unbind()
    for more in vectors[1:]:
        squares, bad = squares + more[0], bad + more[1]
    return GradientStatistics(squares.sqrt(), bad != 0)


def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """float64 []: the norm of all gradients together, the same bits for any number of threads."""
    return gradient_statistics(parameters).norm


def nonfinite_flag(parameters: Iterable[Tensor]) -> Tensor:
    """bool []: whether an update with these gradients must be skipped. Give it to `Adafactor.step(skip=...)`."""
    return gradient_statistics(parameters).nonfinite


@torch.no_grad()
def clip_gradients_(parameters: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Multiplies the gradients by min(1, max_norm / norm), `norm` being the one of all of them."""
    if not max_norm > 0:
        raise ValueError(f"clip_gradients_: expected max_norm > 0, got {max_norm}")
    factor = (max_norm / norm).clamp(max=1.0)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for dtype, grads in by_dtype.items():
        torch._foreach_mul_(grads, factor.to(dtype))


# --- Adafactor


class _Update(NamedTuple):
    """A parameter in the middle of its update."""

    parameter: Tensor
    grad: Tensor
    row_var: Tensor  # the variance if not factored
    col_var: Tensor  # [0] if not factored
    factored: bool
    num_rows: int  # of the whole parameter, as num_cols and num_elements
    num_cols: int
    num_elements: int
    num_matrices: int
    groups: list[str]  # that hold parts of it, and those whose parts split columns, rows, or neither
    column_groups: list[str]
    row_groups: list[str]
    matrix_groups: list[str]


class Adafactor(torch.optim.Optimizer):
    """Adafactor with factored second moments and relative steps.

    Args:
        params: float32 or float64 parameters, or param groups. A tied tensor is listed once.
        lr: the learning rate, a schedule of the count of applied updates (int64 [] tensor -> scalar tensor), a number
            or a scalar tensor. With a schedule the group's "lr" multiplies it and starts at 1.
        decay: the second moment keeps 1 - (t + 1)^decay.
        clipping: bound on the root mean square of a parameter's update.
        eps: added to squared gradients.
        min_scale: a step is relative to max(RMS(weight), min_scale).
        min_factored: the last two dimensions are factored if both are at least this; earlier ones are a batch.
        shards: for a parameter of which this rank holds a part: along which dimensions, and with whom. Its means and
            root mean squares are then those of the whole parameter.

    State of a parameter: row_var and col_var, or variance, in its dtype. A group's "step" is the device's count of
    applied updates.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor | Schedule = glam_schedule,
        *,
        decay: float = -0.8,
        clipping: float = 1.0,
        eps: float = 1e-30,
        min_scale: float = 1e-3,
        min_factored: int = 128,
        shards: Shards | None = None,
    ) -> None:
        if not callable(lr) and not isinstance(lr, Tensor) and not lr >= 0:
            raise ValueError(f"Adafactor: expected lr >= 0, a tensor or a schedule, got {lr}")
        if not decay < 0 or not clipping > 0 or not eps > 0 or not min_scale >= 0:
            raise ValueError(
                "Adafactor: expected decay < 0, clipping > 0, eps > 0 and min_scale >= 0, "
                f"got {decay}, {clipping}, {eps} and {min_scale}"
            )
        self.schedule: Schedule | None = lr if callable(lr) else None
        self.shards = dict(shards or {})
        defaults = {
            "lr": 1.0 if callable(lr) else lr,
            "decay": decay,
            "clipping": clipping,
            "eps": eps,
            "min_scale": min_scale,
            "min_factored": min_factored,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"Adafactor: expected float32 or float64 parameters, got {parameter.dtype}")
        device = self.param_groups[-1]["params"][0].device
        self.param_groups[-1].setdefault("step", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, skip: Tensor | None = None) -> float | None:  # type: ignore[override]
        """One update. Where the bool [] tensor `skip` is true nothing changes and the update is not counted."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            count = self._count(group)
            lr = self._learning_rate(group, count)
            self._update(group, count, lr, skip)
            count.add_(1 if skip is None else skip.logical_not())
        return loss

    def named_state(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The state as checkpoints keep it: NAME.row_var and NAME.col_var or NAME.variance, and "step".

        The tensors are the live ones. Parameters that never had a gradient have no entry.
        """
        named = {
            f"{name}.{key}": value
            for name, parameter in named_parameters
            for key, value in self.state.get(parameter, {}).items()
        }
        return {**named, "step": self._count(self.param_groups[0])}

    def load_named_state(self, named_parameters: Iterable[tuple[str, Tensor]], tensors: Mapping[str, Tensor]) -> None:
        """Takes what `named_state` gave; a parameter without an entry starts anew.

        Raises KeyError or ValueError, having changed nothing, for a tensor that is unknown, does not fit or is missing.
        """
        expected: dict[str, tuple[Tensor, str, tuple[int, ...]]] = {}
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for name, parameter in named_parameters:
            if parameter in groups:
                for key, shape in self._state_shapes(parameter, groups[parameter]["min_factored"]).items():
                    expected[f"{name}.{key}"] = (parameter, key, shape)
        loaded: dict[Tensor, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name == "step":
                continue
            if name not in expected:
                raise KeyError(f"Adafactor: the checkpoint's {name} belongs to no parameter of this optimiser")
            parameter, key, shape = expected[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"Adafactor: expected {name} to be {list(shape)}, got {list(tensor.shape)}")
            state = loaded.setdefault(parameter, {})
            state[key] = tensor.detach().to(parameter.device, parameter.dtype, copy=True)
        for name, (parameter, _, _) in expected.items():
            if parameter in loaded and name not in tensors:
                present = ", ".join(loaded[parameter])
                raise ValueError(f"Adafactor: expected {name} in the checkpoint beside {present}, got none")
        if "step" not in tensors:
            raise KeyError("Adafactor: the checkpoint has no step, the count of updates")
        for parameter in {parameter for parameter, _, _ in expected.values()}:
            self.state.pop(parameter, None)
        self.state.update(loaded)
        for group in self.param_groups:
            self._count(group).copy_(tensors["step"])

    def _count(self, group: dict[str, Any]) -> Tensor:
        """The group's count, on its parameters' device also after a state was loaded from elsewhere."""
        group["step"] = group["step"].to(group["params"][0].device)
        count: Tensor = group["step"]
        return count

    def _learning_rate(self, group: dict[str, Any], count: Tensor) -> Tensor:
        if self.schedule is not None:
            return self.schedule(count) * group["lr"]
        return torch.as_tensor(group["lr"], dtype=torch.float64, device=count.device)

    def _state_shapes(self, parameter: Tensor, min_factored: int) -> dict[str, tuple[int, ...]]:
        shape = tuple(parameter.shape)
        if self._is_factored(parameter, min_factored):
            return {"row_var": shape[:-1], "col_var": (*shape[:-2], shape[-1])}
        return {"variance": shape}

    def _whole_shape(self, parameter: Tensor) -> list[int]:
        shape = list(parameter.shape)
        for shard in self.shards.get(parameter, ()):
            shape[shard.dim] = shard.size
        return shape

    def _is_factored(self, parameter: Tensor, min_factored: int) -> bool:
        shape = self._whole_shape(parameter)
        return len(shape) >= 2 and min(shape[-2:]) >= min_factored

    def _update(self, group: dict[str, Any], count: Tensor, lr: Tensor, skip: Tensor | None) -> None:
        """All parameters of a group, by dtype, as the ops take them."""
        by_dtype: dict[torch.dtype, list[_Update]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.dtype, []).append(self._begin(parameter, group))
        for updates in by_dtype.values():
            self._update_list(updates, group, count, lr, skip)

    def _update_list(
        self, updates: list[_Update], group: dict[str, Any], count: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        """Pass by pass over all parameters; between the passes the sums over shards travel together."""
        ops = torch.ops.glam
        weights, grads = [x.parameter for x in updates], [x.grad for x in updates]
        row_vars, col_vars = [x.row_var for x in updates], [x.col_var for x in updates]
        matrices, elements = [x.num_matrices for x in updates], [x.num_elements for x in updates]

        def parts(
            results: Tensor, lengths: list[int], groups: Callable[[_Update], Sequence[str]]
        ) -> Iterable[tuple[Tensor, Sequence[str]]]:
            """Each parameter's part of what an op returned for all, with the groups over which to sum it."""
            return zip(results.split(lengths), map(groups, updates), strict=True) if self.shards else ()

        row_sums, col_sums, weight_squares = ops.adafactor_sums(grads, weights, [x.factored for x in updates])
        rows, columns = [x.row_var.numel() if x.factored else 0 for x in updates], [x.col_var.numel() for x in updates]
        _sum_over_groups(
            [
                *parts(weight_squares, [1] * len(updates), lambda x: x.groups),
                *parts(row_sums, rows, lambda x: x.column_groups),
                *parts(col_sums, columns, lambda x: x.row_groups),
            ]
        )
        row_means, scaled_squares = ops.adafactor_stats_(
            row_vars, col_vars, grads, row_sums, col_sums, count, skip,
            [x.num_rows for x in updates], [x.num_cols for x in updates], group["decay"], group["eps"],
        )  # fmt: skip
        _sum_over_groups(
            [
                *parts(scaled_squares, matrices, lambda x: x.column_groups + x.row_groups),
                *parts(row_means, matrices, lambda x: x.row_groups),
            ]
        )
        update_squares = ops.adafactor_update_squares(row_means, scaled_squares, matrices)
        _sum_over_groups(parts(update_squares, [1] * len(updates), lambda x: x.matrix_groups))
        ops.adafactor_apply_(
            weights, grads, row_vars, col_vars, row_means, weight_squares, update_squares, lr, skip, elements,
            group["clipping"], group["min_scale"],
        )  # fmt: skip

    def _begin(self, parameter: Tensor, group: dict[str, Any]) -> _Update:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise RuntimeError("Adafactor: expected dense gradients, got a sparse one")
        state = self.state[parameter]
        if not state:
            for key, shape in self._state_shapes(parameter, group["min_factored"]).items():
                state[key] = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
        factored = "col_var" in state
        row_var = state["row_var"] if factored else state["variance"]
        col_var = state["col_var"] if factored else parameter.new_empty(0)
        whole = self._whole_shape(parameter)
        num_rows, num_cols = whole[-2:] if factored else (1, 1)
        shards = self.shards.get(parameter, ())

        split = {dim: [shard.group for shard in shards if factored and shard.dim == dim] for dim in (-1, -2)}
        every = [shard.group for shard in shards]
        return _Update(
            parameter=parameter,
            grad=grad,
            row_var=row_var,
            col_var=col_var,
            factored=factored,
            num_rows=num_rows,
            num_cols=num_cols,
            num_elements=math.prod(whole),
            num_matrices=math.prod(parameter.shape[:-2]) if factored else 1,
            groups=every,
            column_groups=split[-1],
            row_groups=split[-2],
            matrix_groups=[name for name in every if name not in split[-1] + split[-2]],
        )
