"""TrainingRun: a run from its configuration to its last checkpoint, in the folder FOLDER/NAME.

    config.toml      the resolved configuration
    checkpoints/     step-000123/, as glam_ext.checkpoint says
    metrics.jsonl    one object per log line and evaluation
    tb/              TensorBoard, if asked

A step's data and random numbers depend on (seed, counters) alone and the counters are in the checkpoint, with
weights, optimiser state and the sums of an unfinished log line. So the same configuration, started again, goes on from
the newest good checkpoint to the same bits as if it had never stopped, with any number of threads.

Under torchrun every process builds the same TrainingRun and does its share ([parallel]); checkpoints know nothing of
the layout, so a run may go on with other processes, to the same numbers within rounding. The first rank writes the log.
"""

from __future__ import annotations

import base64
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from glam_ext.checkpoint import (
    Checkpoint,
    CheckpointError,
    Piece,
    load_checkpoint,
    save_checkpoint,
    step_folders,
    step_of,
)
from glam_ext.counts import count_parameters, flops_per_token
from glam_ext.data import BatchSampler, DataError, TokenFolder
from glam_ext.distributed import GradientReducer, init_mesh
from glam_ext.doctor import build_info
from glam_ext.evaluation.heldout import HeldOutLoss, evaluate
from glam_ext.model import GLaM
from glam_ext.training.config import ConfigError, TrainingConfig
from glam_ext.training.metrics import (
    MetricsFile,
    MetricWindow,
    TensorBoard,
    dense_gemm_rate,
    evaluation_line,
    train_line,
)
from glam_ext.training.optimizers import make_updater
from glam_ext.training.signals import EXIT_INTERRUPTED, StopSignals
from glam_ext.training.step import accumulate_gradients
from glam_ext.training.toml_files import differences, load_config, to_toml

# A forward pass multiplies once per weight, the backward pass twice.
TRAINING_OVER_FORWARD = 3
# The side of the matrices whose product is the measure of utilisation.
GEMM_SIZES = {"cpu": 1024, "cuda": 8192}
# Fields of the model that may change when a run is resumed: they do not change what is computed.
RESUMABLE_MODEL_FIELDS = ("recompute",)


class TrainingRun:
    """Everything a run needs, built by the constructor; `resume` and `train` do the work, `close` leaves the processes.

    Raises ConfigError and DataError for what cannot work, CheckpointError where a checkpoint cannot be used or saved,
    LostRankError where another process is gone.
    """

    def __init__(self, config: TrainingConfig, log: Callable[[str], None] = print) -> None:
        self.config = config
        self.device = _take_device(config.run.device)
        try:
            self.mesh = init_mesh(config.parallel.expert, config.parallel.timeout_seconds)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        mesh = self.mesh
        config.check_world(mesh.world_size)
        self.log = log if mesh.is_first else _no_log
        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)  # nothing here draws from it; what a user adds may
        self.data = TokenFolder(config.data.train, verify=config.data.verify)
        self.heldout = TokenFolder(config.data.heldout, verify=config.data.verify) if config.data.heldout else None
        self._check_data()
        expert_group = mesh.group_name("expert")
        self.model = GLaM(
            config.model,
            seed=config.run.seed,
            device=self.device,
            expert_group=expert_group,
            exchange_chunks=config.parallel.exchange_chunks if expert_group else 1,
        )
        self._experts = self.model.expert_parameters()
        self.reducer = GradientReducer.of_model(self.model, mesh, config.parallel.bucket_megabytes << 20)
        self.updater = make_updater(config, self.model, expert_group)
        self.sampler = BatchSampler(
            self.data, config.data.batch_size, config.run.seed, config.data.shuffle, mesh.rank, mesh.world_size
        )
        self.window = MetricWindow(config.model.num_moe_layers, config.model.num_experts, self.device)
        self.step = 0
        self.tokens = 0
        self.folder = config.run_folder
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", mesh)
        self.tensorboard: TensorBoard | None = None
        self.last_evaluation: HeldOutLoss | None = None
        self._saved_step: int | None = None
        self._folder_is_open = False
        self._gemm_rate = math.nan
        self._busy_seconds = self._busy_tokens = self._busy_steps = 0.0  # since the last line, in this process

    def close(self) -> None:
        """After the last call, by all processes together."""
        self.mesh.close()

    # --- the run folder

    def resume(self) -> bool:
        """Continues from the run's newest good checkpoint, or the one that was named; False if there is none yet."""
        with self.mesh.naming_lost_ranks():
            path = self._checkpoint_to_resume()
            if path is not None:
                self._restore(load_checkpoint(path, part=self._part_of, ranks=self.mesh))
            self._open_folder()
        return path is not None

    def save(self) -> None:
        """Writes a checkpoint of the present step, unless there is one already."""
        if self._saved_step == self.step:
            return
        self.metrics.sync()
        start = time.perf_counter()
        folder = save_checkpoint(
            self.folder / "checkpoints",
            self.step,
            self.config.model,
            self._pieces(self.model.state_dict()),
            self._pieces(self.updater.state_tensors()),
            self._trainer_state(),
            self.config.checkpoint.keep,
            self.mesh,
        )
        self._saved_step = self.step
        self.log(f"saved {folder} ({time.perf_counter() - start:.1f} s)")

    # --- what of the whole model is here: of tensors that belong to an expert weight, those of the local experts

    def _is_split(self, name: str, shape: Sequence[int], experts: int) -> bool:
        """Whether a weight, or an entry of an optimiser's state, has `experts` parts along its first dimension."""
        owner = name if name in self._experts else name.rpartition(".")[0]
        return owner in self._experts and len(shape) > 0 and shape[0] == experts

    def _pieces(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | Piece]:
        here, every = self.model.local_experts, self.config.model.num_experts
        if len(here) == every:
            return dict(tensors)
        return {
            name: Piece(tensor, (every, *tensor.shape[1:]), (here.start, *(0 for _ in tensor.shape[1:])))
            if self._is_split(name, tensor.shape, len(here))
            else tensor
            for name, tensor in tensors.items()
        }

    def _part_of(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        here, every = self.model.local_experts, self.config.model.num_experts
        return (slice(here.start, here.stop),) if self._is_split(name, shape, every) else ()

    def _trainer_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_updates": self.updater.skipped,
            "optimizer": self.updater.name,
            "tokenizer_hash": self.data.manifest.tokenizer_hash,
            "sequence_length": self.data.manifest.sequence_length,
            "batch_size": self.config.data.batch_size,
            "data": self.sampler.state_dict(),
            "rng": {"seed": self.config.run.seed, "torch": _encode(torch.get_rng_state())},
            "window": self.window.state_dict(),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        path, trainer = checkpoint.path, checkpoint.trainer
        if not trainer:
            raise CheckpointError(f"{path}: has no trainer.json, it is an exported model; name a checkpoint of a run")
        mine, theirs = self.config.model.to_dict(), checkpoint.config.to_dict()
        changed = [name for name in mine if mine[name] != theirs[name] and name not in RESUMABLE_MODEL_FIELDS]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"model.{name}: is {mine[name]} here and {theirs[name]} in {path}; restore it, or give the run another "
                "name (run.name)"
            )
        if trainer["optimizer"] != self.updater.name:
            raise ConfigError(
                f'optimizer.name: is "{self.updater.name}" here and "{trainer["optimizer"]}" in {path}; restore it, or '
                "give the run another name (run.name)"
            )
        if trainer["step"] > self.config.run.steps:
            raise ConfigError(
                f"run.steps: is {self.config.run.steps}, below the {trainer['step']} steps of {path}; raise it"
            )
        if trainer["batch_size"] != self.config.data.batch_size:
            self.log(f"data.batch_size changes from {trainer['batch_size']} to {self.config.data.batch_size}")
        self.model.load_state_dict(checkpoint.model)
        self.updater.load_state(checkpoint.optimizer, trainer["skipped_updates"])
        self.sampler.load_state_dict(trainer["data"])
        self.window.load_state_dict(trainer["window"])
        torch.set_rng_state(_decode(trainer["rng"]["torch"]))
        self.step, self.tokens = trainer["step"], trainer["tokens"]
        if path.resolve().parent == (self.folder / "checkpoints").resolve():
            self._saved_step = self.step
        self.log(f"resumed {path}: step {self.step}, {self.tokens:,} tokens")

    def _checkpoint_to_resume(self) -> Path | None:
        """The first rank looks, and all do as it says."""
        found: Path | ConfigError | None = None
        if self.mesh.is_first:
            try:
                found = self._look_for_checkpoint()
            except ConfigError as error:
                found = error
        found = self.mesh.all_gather(found)[0]
        if isinstance(found, ConfigError):
            raise found
        return found

    def _look_for_checkpoint(self) -> Path | None:
        root = self.folder / "checkpoints"
        complete = [folder for folder in step_folders(root) if (folder / "COMPLETE").exists()] if root.is_dir() else []
        named = self.config.checkpoint.resume_from
        if not named:
            return root if complete else None
        step = step_of(named)
        if step is None:
            raise ConfigError(f"checkpoint.resume_from: expected a folder called step-000123, got {named}")
        newer = [folder.name for folder in complete if (step_of(folder) or 0) > step]
        if newer:
            raise ConfigError(
                f"checkpoint.resume_from: {root} has newer checkpoints ({', '.join(reversed(newer))}); move them away "
                "to go back to an earlier step, or remove checkpoint.resume_from to go on from the newest"
            )
        return Path(named)

    def _open_folder(self) -> None:
        """Writes config.toml and takes back what was logged about steps that are still to come."""
        if self.mesh.is_first:
            self._write_config()
        self.metrics.truncate(self.step)
        if self.config.run.tensorboard and self.mesh.is_first:
            self.tensorboard = TensorBoard(self.folder / "tb")
            self.tensorboard.resume_after(self.step)
        self._folder_is_open = True

    def _write_config(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.toml"
        if file.exists():
            self._log_changes(file)
        hidden = file.with_name(".tmp-config.toml")
        hidden.write_text(to_toml(self.config), encoding="utf-8")
        hidden.replace(file)

    def _log_changes(self, file: Path) -> None:
        try:
            for line in differences(load_config(file), self.config):
                self.log(f"changed since the run's last start: {line}")
        except ConfigError as error:
            self.log(f"the run's last configuration cannot be compared: {error}")

    def _check_data(self) -> None:
        for folder in (self.data, self.heldout):
            if folder is not None:
                manifest = folder.manifest
                self.config.check_data(
                    str(folder.folder), manifest.vocab_size, manifest.sequence_length, self.mesh.world_size
                )
        if self.heldout is not None and self.heldout.manifest.tokenizer_hash != self.data.manifest.tokenizer_hash:
            raise DataError(
                f"{self.heldout.folder}: was made with another tokenizer than {self.data.folder}; prepare them together"
            )

    # --- training

    def train(self) -> int:
        """Trains to the last step. Returns 0, or EXIT_INTERRUPTED after SIGTERM or SIGINT; all is saved then too.

        Calls `resume` first where the caller has not: nothing of the run's folder is written over.
        """
        if not self._folder_is_open:
            self.resume()
        dtype = getattr(torch, self.config.model.compute_dtype)
        self._gemm_rate = dense_gemm_rate(dtype, self.device, GEMM_SIZES[self.device.type])
        self.log(self._description())
        self.model.train()
        # In this order: torchrun sends SIGTERM to all when one is gone, and who is to say which must not die of it.
        with StopSignals() as stop, self.mesh.naming_lost_ranks():
            finished = self._train_until(lambda: self.mesh.any(stop.requested))
            self.save()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if not finished:
            cause = stop.name or "a signal to another process"
            self.log(f"stopped by {cause} after step {self.step}; the same command goes on from here")
        return 0 if finished else EXIT_INTERRUPTED

    def _train_until(self, stop: Callable[[], bool]) -> bool:
        """True when the last step and its evaluation are done, False when stopped before."""
        # The run may have been stopped in the evaluation that was due after its last step.
        if self._evaluation_is_due() and not self._evaluate(stop):
            return False
        while self.step < self.config.run.steps:
            if stop():
                return False
            self._train_step()
            if self.step % self.config.run.log_interval == 0 or self.step == self.config.run.steps:
                self._log_window()
            if self._evaluation_is_due() and not self._evaluate(stop):
                return False
            interval = self.config.checkpoint.interval
            if interval and self.step % interval == 0:
                self.save()
        return True

    def _train_step(self) -> None:
        start = time.perf_counter()
        batch, whole = self.sampler.next_share()
        sums = accumulate_gradients(
            self.model,
            batch,
            self.config.micro_batch_size(self.mesh.world_size),
            whole=whole,
            reducer=self.reducer,
            denominator=self.config.loss.denominator,
            seed=self.config.run.seed,
            step=self.step,
        )
        grad_norm = self.updater.update(self.step)
        self.step += 1
        self.tokens += whole.num_real
        self.window.add(sums.over_ranks(self.mesh), whole.num_real, grad_norm)
        self._busy_seconds += time.perf_counter() - start
        self._busy_tokens += whole.num_real
        self._busy_steps += 1

    def _log_window(self) -> None:
        start = time.perf_counter()
        summary = self.window.summary()
        seconds = max(self._busy_seconds + time.perf_counter() - start, 1e-9)  # the host waited for the device here
        rate = self._busy_tokens / seconds
        manifest = self.data.manifest
        flops_per_second = rate * self._flops_per_token()
        record = {
            "kind": "train",
            "step": self.step,
            "tokens": self.tokens,
            "epoch": self.sampler.epoch,
            **summary,
            # By the mean number of bytes per token of the whole training data.
            "bits_per_byte": summary["loss"] / math.log(2) * manifest.num_targets / manifest.utf8_bytes,
            "learning_rate": self.updater.learning_rate(self.step - 1),
            "skipped_updates": self.updater.skipped,
            "tokens_per_second": rate,
            "model_flops_per_second": flops_per_second,
            "utilisation_of_dense_gemm": flops_per_second / (self._gemm_rate * self.mesh.world_size),
            "eta_seconds": (self.config.run.steps - self.step) * seconds / self._busy_steps,
        }
        self._write(record)
        self.log(train_line(record, self.config.run.steps))
        self.window.reset()
        self._busy_seconds = self._busy_tokens = self._busy_steps = 0.0

    def _evaluation_is_due(self) -> bool:
        if self.heldout is None or self.step == 0 or self.metrics.has("evaluation", self.step):
            return False
        interval = self.config.evaluation.interval
        return self.step == self.config.run.steps or (interval > 0 and self.step % interval == 0)

    def _evaluate(self, stop: Callable[[], bool]) -> bool:
        """False if it was stopped; the evaluation is then done again when the run is resumed."""
        assert self.heldout is not None
        start = time.perf_counter()
        batch_size = self.config.evaluation_batch_size(self.mesh.world_size)
        loss = evaluate(self.model, self.heldout, batch_size, stop, self.mesh)
        if loss is None:
            return False
        self.last_evaluation = loss
        seconds = time.perf_counter() - start
        record = {"kind": "evaluation", "step": self.step, "tokens": self.tokens, **loss.as_dict(), "seconds": seconds}
        self._write(record)
        self.log(evaluation_line(record))
        return True

    def _write(self, record: dict[str, Any]) -> None:
        self.metrics.write(record)
        if self.tensorboard is not None:
            self.tensorboard.write(record)

    def _flops_per_token(self) -> float:
        context = self.data.manifest.sequence_length / 2
        return TRAINING_OVER_FORWARD * flops_per_token(self.config.model, context).total

    def _description(self) -> str:
        count = count_parameters(self.config.model)
        manifest, data = self.data.manifest, self.config.data
        steps_left = self.config.run.steps - self.step
        micro_batch_size = self.config.micro_batch_size(self.mesh.world_size)
        return (
            f"{count.total:,} parameters, {count.active:,} active per token; {manifest.num_targets:,} training tokens "
            f"in {manifest.num_rows:,} rows of {manifest.sequence_length}; {steps_left} steps of {data.batch_size} "
            f"rows in micro-batches of {micro_batch_size}; {self._layout()}; "
            f"{self.config.model.compute_dtype}, dense GEMM {self._gemm_rate / 1e9:.0f} GFLOP/s"
        )

    def _layout(self) -> str:
        threads = f"{torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            threads = f"{torch.cuda.get_device_name(self.device)} and {threads}"
        if self.mesh.world_size == 1:
            return threads
        data, expert = self.mesh.axis_size("data"), self.mesh.axis_size("expert")
        return f"{self.mesh.world_size} processes ({data} data x {expert} expert) of {threads}"


def _take_device(kind: str) -> torch.device:
    """The device of this process, made the current one."""
    if kind == "cpu":
        return torch.device("cpu")
    cuda = build_info()["backends"]["cuda"]
    if not cuda["built"]:
        raise ConfigError(f'run.device: is "cuda", but glam_ext was built without CUDA kernels: {cuda["reason"]}')
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f'run.device: is "cuda", but torch finds {count} GPUs for process {index} of this machine; start no more '
            "processes than GPUs (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _no_log(_: str) -> None:
    pass


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
