"""The update at the end of a step: gradient norm, clipping, skipping what is not finite, the optimiser itself.

A step with a gradient that is not finite changes nothing: weights, optimiser state and its counters stay. That is
decided on the device; the host is not asked and does not wait. How, depends on the optimiser:

    adafactor               takes the flag as an argument
    torch.optim, fused      takes the flag as `found_inf`, the door through which torch's GradScaler does the same
    torch.optim, otherwise  steps on a zero gradient, and weights and state are then put back where the flag is set

Where experts are spread over ranks, the norm and Adafactor's means are those of the whole model. The optimisers of
torch.optim that can be used here work element by element and need to know nothing of it.

An optimiser of torch.optim makes its state in its first update, so until one has been applied the host does look.
GLaM's schedule with Adafactor follows the count of applied updates on the device, every other rate the attempted steps.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glam_ext.model import GLaM
from glam_ext.optim import (
    Adafactor,
    Shard,
    clip_gradients_,
    cosine_schedule,
    glam_schedule,
    gradient_statistics,
    inverse_sqrt_schedule,
    warmup_factor,
)
from glam_ext.training.config import ConfigError, TrainingConfig

# Arguments of an optimiser that the configuration says elsewhere, or that the trainer gives.
RESERVED = {"params": "the model", "lr": "schedule.learning_rate", "shards": "the process groups"}
# Arguments of torch.optim that choose among its implementations: with one of them given, the choice is the user's.
IMPLEMENTATIONS = ("fused", "foreach", "capturable", "differentiable")
UNUSABLE = {"lbfgs": "it needs a closure", "sparseadam": "the gradients are dense", "muon": "it takes matrices only"}


class Updater:
    """What the two kinds share. `update` applies the gradients of one step and clears them."""

    name: str

    def __init__(self, config: TrainingConfig, model: GLaM, expert_group: str) -> None:
        self._schedule, self._total_steps = config.schedule, config.run.steps
        self._clip_norm = config.optimizer.clip_norm
        self._parameters: dict[str, Tensor] = dict(model.named_parameters())
        self._shards: dict[Tensor, list[Shard]] = {}
        if expert_group:
            whole = Shard(-3, model.config.num_experts, expert_group)
            self._shards = {parameter: [whole] for parameter in model.expert_parameters().values()}
        device = next(iter(self._parameters.values())).device
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)

    def learning_rate(self, step: int) -> float:
        """Of the 0-based `step`."""
        schedule = self._schedule
        if schedule.kind == "glam":
            return glam_schedule(step, schedule.multiplier, schedule.constant_steps)
        if schedule.kind == "cosine":
            return cosine_schedule(
                step, schedule.learning_rate, self._total_steps, schedule.warmup_steps, schedule.final_fraction
            )
        if schedule.kind == "inverse_sqrt":
            return inverse_sqrt_schedule(step, schedule.learning_rate, schedule.warmup_steps)
        return schedule.learning_rate * warmup_factor(step, schedule.warmup_steps)

    @property
    def skipped(self) -> int:
        """Updates that were skipped; waits for the device."""
        return int(self._skipped)

    def update(self, step: int) -> Tensor:
        """Applies the gradients and clears them; returns their global norm before clipping, float64 []: that of the
        whole model, whatever part of it is here."""
        parameters = list(self._parameters.values())
        norm, nonfinite = gradient_statistics(parameters, self._shards)
        self._skipped += nonfinite
        if self._clip_norm > 0:
            clip_gradients_(parameters, norm, self._clip_norm)
        self._apply(step, nonfinite)
        for parameter in parameters:
            parameter.grad = None
        return norm

    def _apply(self, step: int, skip: Tensor) -> None:
        raise NotImplementedError

    def state_tensors(self) -> dict[str, Tensor]:
        """The optimiser's own tensors as "PARAMETER.ENTRY", not copies."""
        raise NotImplementedError

    def load_state(self, tensors: Mapping[str, Tensor], skipped: int) -> None:
        """Takes what `state_tensors` gave and the number of skipped updates."""
        raise NotImplementedError


class AdafactorUpdater(Updater):
    """Updates by glam_ext.optim.Adafactor."""

    name = "adafactor"

    def __init__(self, config: TrainingConfig, model: GLaM, expert_group: str) -> None:
        super().__init__(config, model, expert_group)
        options = _checked_options("adafactor", Adafactor, config.optimizer.options)
        schedule = config.schedule
        self._follows_count = schedule.kind == "glam"
        rate: Any = self.learning_rate(0)
        if self._follows_count:
            rate = functools.partial(
                glam_schedule, multiplier=schedule.multiplier, constant_steps=schedule.constant_steps
            )
        try:
            self._optimizer = Adafactor(self._parameters.values(), rate, shards=self._shards, **options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"[optimizer] {error}") from error

    def _apply(self, step: int, skip: Tensor) -> None:
        if not self._follows_count:
            for group in self._optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
        self._optimizer.step(skip=skip)

    def state_tensors(self) -> dict[str, Tensor]:
        return self._optimizer.named_state(self._parameters.items())

    def load_state(self, tensors: Mapping[str, Tensor], skipped: int) -> None:
        try:
            self._optimizer.load_named_state(self._parameters.items(), tensors)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"[optimizer] the checkpoint's state does not fit: {error}; restore them") from error
        self._skipped.fill_(skipped)


class TorchUpdater(Updater):
    """Updates by a class of torch.optim."""

    def __init__(self, config: TrainingConfig, model: GLaM, expert_group: str) -> None:
        super().__init__(config, model, expert_group)
        self.name = config.optimizer.name.lower()
        kind = _torch_optimizer(config.optimizer.name)
        options = _checked_options(self.name, kind, config.optimizer.options)
        if "fused" in inspect.signature(kind).parameters and not options.keys() & set(IMPLEMENTATIONS):
            options["fused"] = True
        try:
            self._optimizer = kind(list(self._parameters.values()), lr=self.learning_rate(0), **options)  # type: ignore[call-arg]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"[optimizer] torch.optim.{kind.__name__}: {error}") from error
        self._takes_flag = bool(options.get("fused"))
        self._has_state = False

    def _apply(self, step: int, skip: Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        if not self._has_state:
            if not bool(skip):
                self._optimizer.step()
                self._has_state = True
        elif self._takes_flag:
            self._optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            self._optimizer.step()
        else:
            self._step_and_put_back(skip)

    @torch.no_grad()
    def _step_and_put_back(self, skip: Tensor) -> None:
        live = [*self._parameters.values(), *self.state_tensors().values()]
        before = [tensor.detach().clone() for tensor in live]
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad = torch.where(skip, torch.zeros_like(parameter.grad), parameter.grad)
        self._optimizer.step()
        for tensor, old in zip(live, before, strict=True):
            tensor.copy_(torch.where(skip.to(tensor.device), old, tensor))

    def state_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state(self, tensors: Mapping[str, Tensor], skipped: int) -> None:
        index = {name: position for position, name in enumerate(self._parameters)}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition(".")
            if parameter not in index:
                raise ConfigError(f"[optimizer] the checkpoint's {name} belongs to no parameter of this model")
            state.setdefault(index[parameter], {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._has_state = bool(state)
        self._skipped.fill_(skipped)


def make_updater(config: TrainingConfig, model: GLaM, expert_group: str = "") -> Updater:
    """The updater of the configuration's optimizer; ConfigError names what it does not know or take.

    expert_group: the process group over which the model's experts are spread.
    """
    if config.optimizer.name.lower() == "adafactor":
        return AdafactorUpdater(config, model, expert_group)
    return TorchUpdater(config, model, expert_group)


def _torch_optimizer(name: str) -> type[torch.optim.Optimizer]:
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() in UNUSABLE:
        raise ConfigError(f'optimizer.name: "{name}" cannot be used, {UNUSABLE[name.lower()]}; use "adamw"')
    if name.lower() not in classes:
        usable = ", ".join(sorted(classes.keys() - UNUSABLE.keys()))
        raise ConfigError(f'optimizer.name: expected one of {usable}, got "{name}"')
    return classes[name.lower()]


def _checked_options(name: str, kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    accepted = inspect.signature(kind).parameters.keys() - RESERVED.keys()
    for option in options:
        if option in RESERVED:
            raise ConfigError(f"optimizer.options.{option}: is given by {RESERVED[option]}; remove it here")
        if option not in accepted:
            raise ConfigError(
                f'optimizer.options.{option}: "{name}" has no such option; it takes {", ".join(sorted(accepted))}'
            )
    # TOML has lists where torch.optim wants tuples.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
