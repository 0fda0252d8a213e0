"""TrainingConfig: every choice of a training run, one frozen dataclass per section of its TOML file.

Reading and writing TOML is in `toml_files`; this file says what may be written and what is impossible. A combination
that cannot work is a `ConfigError` that names the key and the fix. What needs the data too (vocabulary, sequence
length) is checked by `check_data`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glam_ext.config import GLaMConfig


class ConfigError(ValueError):
    """A training configuration that cannot be used. The message names the key and the fix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSection:
    """[run]: what the run is called and how long it is. Its folder is FOLDER/NAME."""

    name: str
    steps: int  # updates, skipped ones included
    folder: str = "runs"
    seed: int = 0  # of the initial weights, the data order and the random routing policies
    device: str = "cpu"  # or cuda: each process takes the GPU of its LOCAL_RANK
    threads: int = 0  # 0: what torch takes by itself; the bits of a run do not depend on it
    log_interval: int = 10  # steps per log line
    tensorboard: bool = False  # also write FOLDER/NAME/tb


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """[data]: token folders, as glam_ext.recipes.prepare_text makes them."""

    train: str
    heldout: str = ""  # "": no evaluation
    batch_size: int  # rows of one step, of all processes together
    micro_batch_size: int = 0  # rows of one forward and backward of a process; 0: its whole share of the batch at once
    shuffle: bool = True
    verify: bool = True  # compare the files with their hashes at start; reads every byte once


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """[parallel]: how the processes that torchrun starts share the work. Each trains on its own rows; the result is
    that of one process."""

    expert: int = 1  # processes over which the experts of a layer are spread; the rest of them are copies (data)
    exchange_chunks: int = 1  # parts of a process's experts: one is computed while the rows of others travel
    bucket_megabytes: int = 8  # gradients travel in buckets of this size
    timeout_seconds: int = 600  # a transfer that a process does not join in this time is an error


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """[optimizer]: "adafactor", or the name of a class of torch.optim in any case ("adamw", "SGD")."""

    name: str = "adafactor"
    clip_norm: float = 0.0  # of the global gradient norm; 0: no clipping, as in the paper
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of the class


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """[schedule]: the learning rate of a step. glam is multiplier / sqrt(max(t, constant_steps)), without warm-up; the
    others rise linearly over warmup_steps and then stay (constant) or fall (cosine to final_fraction, inverse_sqrt)."""

    kind: str = "glam"  # glam | constant | cosine | inverse_sqrt
    multiplier: float = 1.0  # glam: with constant_steps 10,000 a relative step of 0.01
    constant_steps: int = 10_000  # glam
    learning_rate: float = 0.0  # the others: the peak
    warmup_steps: int = 0  # the others; inverse_sqrt falls from here
    final_fraction: float = 0.0  # cosine: of learning_rate, reached at run.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSection:
    """[loss]: what the summed loss of a step is divided by."""

    denominator: str = "tokens"  # the real tokens of the whole step; or positions: batch_size * S, as public builders


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """[checkpoint]: the last step is always saved."""

    interval: int = 1000  # steps; 0: only at the end and on SIGTERM
    keep: int = 2  # folders that stay; 0: all
    resume_from: str = ""  # a checkpoint folder; "": the newest good one of the run, if there is any


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """[evaluation]: held-out nats, perplexity and bits per byte; always after the last step."""

    interval: int = 1000  # steps; 0: only at the end
    batch_size: int = 0  # rows; 0: as in training


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A whole run. Construction raises `ConfigError` for values that are impossible, alone or together."""

    run: RunSection
    model: GLaMConfig
    data: DataSection
    optimizer: OptimizerSection = dataclasses.field(default_factory=OptimizerSection)
    schedule: ScheduleSection = dataclasses.field(default_factory=ScheduleSection)
    loss: LossSection = dataclasses.field(default_factory=LossSection)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    parallel: ParallelSection = dataclasses.field(default_factory=ParallelSection)

    def __post_init__(self) -> None:
        _check_run(self.run)
        _check_batches(self.data)
        _check_schedule(self.schedule, self.run.steps)
        _check_parallel(self.parallel, self.model)
        _require(self.optimizer.clip_norm >= 0, "optimizer.clip_norm", "at least 0 (0: off)", self.optimizer.clip_norm)
        _choose("loss.denominator", self.loss.denominator, ("tokens", "positions"))
        for key, value in (
            ("checkpoint.interval", self.checkpoint.interval),
            ("checkpoint.keep", self.checkpoint.keep),
            ("evaluation.interval", self.evaluation.interval),
            ("evaluation.batch_size", self.evaluation.batch_size),
        ):
            _require(value >= 0, key, "at least 0", value)

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder, self.run.name)

    def micro_batch_size(self, world_size: int = 1) -> int:
        """Rows of one forward and backward pass of each of the `world_size` processes."""
        return self.data.micro_batch_size or self.data.batch_size // world_size

    def evaluation_batch_size(self, world_size: int = 1) -> int:
        """Rows of one forward pass of all processes together."""
        return self.evaluation.batch_size or self.micro_batch_size(world_size) * world_size

    def check_world(self, world_size: int) -> None:
        """What can only be known with the processes at hand: they share batches and experts evenly."""
        for key, rows in (
            ("data.batch_size", self.data.batch_size),
            ("evaluation.batch_size", self.evaluation.batch_size),
        ):
            _require(rows % world_size == 0, key, f"a multiple of the {world_size} processes", rows)
        share, micro = self.data.batch_size // world_size, self.micro_batch_size(world_size)
        _require(
            share % micro == 0,
            "data.micro_batch_size",
            f"a divisor of each process's share of data.batch_size, {share}",
            micro,
        )
        expert = self.parallel.expert
        _require(world_size % expert == 0, "parallel.expert", f"a divisor of the {world_size} processes", expert)

    def check_data(self, folder: str, vocab_size: int, sequence_length: int, world_size: int = 1) -> None:
        """What can only be known with a token folder at hand: ids fit the model, routing groups fit the batches."""
        if vocab_size > self.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size: expected at least the {vocab_size:,} ids of {folder}, got "
                f"{self.model.vocab_size:,}; set model.vocab_size = {vocab_size}"
            )
        group_size = self.model.group_size
        if self.model.num_moe_layers == 0 or group_size <= 0:
            return
        for key, rows in (
            ("data.micro_batch_size", self.micro_batch_size(world_size)),
            ("evaluation.batch_size", self.evaluation_batch_size(world_size) // world_size),
        ):
            if rows * sequence_length % group_size:
                raise ConfigError(
                    f"model.group_size: expected a divisor of {key} * sequence length = {rows} * {sequence_length}, "
                    f"got {group_size}; a routing group cannot cross a process or a micro-batch: use 0 (one sequence) "
                    "or a divisor"
                )


def _check_run(run: RunSection) -> None:
    named = run.name and run.name not in (".", "..") and not set(run.name) & set("/\\\0")
    _require(named, "run.name", "the name of a folder, without slashes", repr(run.name))
    _require(run.steps >= 1, "run.steps", "at least 1", run.steps)
    _require(run.log_interval >= 1, "run.log_interval", "at least 1", run.log_interval)
    _choose("run.device", run.device, ("cpu", "cuda"))
    _require(run.threads >= 0, "run.threads", "at least 0 (0: torch's choice)", run.threads)
    _require(0 <= run.seed < 2**63, "run.seed", "in [0, 2^63)", run.seed)


def _check_batches(data: DataSection) -> None:
    _require(data.train, "data.train", "a folder made by glam_ext.recipes.prepare_text", repr(data.train))
    _require(data.batch_size >= 1, "data.batch_size", "at least 1", data.batch_size)
    _require(data.micro_batch_size >= 0, "data.micro_batch_size", "at least 0 (0: the batch)", data.micro_batch_size)
    if data.micro_batch_size:
        _require(
            data.batch_size % data.micro_batch_size == 0,
            "data.micro_batch_size",
            f"a divisor of data.batch_size = {data.batch_size}",
            data.micro_batch_size,
        )


def _check_parallel(parallel: ParallelSection, model: GLaMConfig) -> None:
    _require(parallel.expert >= 1, "parallel.expert", "at least 1", parallel.expert)
    _require(parallel.exchange_chunks >= 1, "parallel.exchange_chunks", "at least 1", parallel.exchange_chunks)
    _require(parallel.bucket_megabytes >= 1, "parallel.bucket_megabytes", "at least 1", parallel.bucket_megabytes)
    _require(parallel.timeout_seconds >= 1, "parallel.timeout_seconds", "at least 1", parallel.timeout_seconds)
    if parallel.expert == 1:
        return
    _require(
        model.num_moe_layers > 0 and model.num_experts % parallel.expert == 0,
        "parallel.expert",
        f"a divisor of model.num_experts = {model.num_experts}",
        parallel.expert,
    )
    _require(
        model.num_experts // parallel.expert % parallel.exchange_chunks == 0,
        "parallel.exchange_chunks",
        f"a divisor of the {model.num_experts // parallel.expert} experts of a process",
        parallel.exchange_chunks,
    )


def _check_schedule(schedule: ScheduleSection, steps: int) -> None:
    _choose("schedule.kind", schedule.kind, ("glam", "constant", "cosine", "inverse_sqrt"))
    if schedule.kind == "glam":
        _require(schedule.multiplier > 0, "schedule.multiplier", "above 0", schedule.multiplier)
        _require(schedule.constant_steps >= 1, "schedule.constant_steps", "at least 1", schedule.constant_steps)
        for field in ("learning_rate", "warmup_steps", "final_fraction"):
            if getattr(schedule, field):
                raise ConfigError(
                    f'schedule.{field}: has no meaning for the kind "glam"; remove it, set schedule.multiplier, or '
                    'choose the kind "constant", "cosine" or "inverse_sqrt"'
                )
        return
    _require(
        schedule.learning_rate > 0, "schedule.learning_rate", f'above 0 for "{schedule.kind}"', schedule.learning_rate
    )
    _require(schedule.warmup_steps >= 0, "schedule.warmup_steps", "at least 0", schedule.warmup_steps)
    _require(0 <= schedule.final_fraction <= 1, "schedule.final_fraction", "in [0, 1]", schedule.final_fraction)
    if schedule.kind == "cosine":
        _require(
            schedule.warmup_steps < steps,
            "schedule.warmup_steps",
            f"below run.steps = {steps}",
            schedule.warmup_steps,
        )
    if schedule.kind == "inverse_sqrt":
        _require(schedule.warmup_steps >= 1, "schedule.warmup_steps", "at least 1, where the fall starts", 0)


def _require(condition: object, key: str, expected: str, got: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {got}")


def _choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, "one of " + ", ".join(f'"{choice}"' for choice in choices), f'"{value}"')
