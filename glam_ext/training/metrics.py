"""What a run says about itself: a line on the screen, one JSON object per line in metrics.jsonl, TensorBoard if asked.

A line covers the steps since the line before it. Its sums live on the model's device and reach the host once per line.
They are part of the checkpoint, so a resumed run writes the lines that an unbroken one would have written; only the
times differ. E experts, L MoE layers.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glam_ext._files import fsync
from glam_ext.distributed import ONE_PROCESS, Ranks
from glam_ext.training.step import StepSums

STATISTICS_AFTER_EXPERTS = ("dropped_first", "dropped_second", "with_0", "with_1", "with_2", "real")


class MetricWindow:
    """Sums over the steps of one log line."""

    def __init__(self, num_moe_layers: int, num_experts: int, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._statistics_shape = (num_moe_layers, num_experts + len(STATISTICS_AFTER_EXPERTS))
        self.reset()

    def reset(self) -> None:
        self.steps = self.tokens = 0
        self._sums: dict[str, Tensor] = {
            name: torch.zeros((), dtype=torch.float64, device=self._device)
            for name in ("total", "nll", "aux", "router_z", "grad_norm", "grad_norm_steps")
        }
        self._statistics = torch.zeros(self._statistics_shape, dtype=torch.int64, device=self._device)

    def add(self, sums: StepSums, tokens: int, grad_norm: Tensor) -> None:
        """Adds a step of `tokens` real tokens. A norm that is not finite (a skipped update) is left out of the mean."""
        self.steps += 1
        self.tokens += tokens
        for name in ("total", "nll", "aux", "router_z"):
            self._sums[name] += getattr(sums, name)
        finite = torch.isfinite(grad_norm)
        self._sums["grad_norm"] += torch.where(finite, grad_norm.double(), 0.0)
        self._sums["grad_norm_steps"] += finite
        self._statistics += sums.router_statistics

    def summary(self) -> dict[str, Any]:
        """Means over the window; loss is nats per real token, without z-loss and aux."""
        sums = {name: float(value) for name, value in self._sums.items()}
        finite_steps = sums["grad_norm_steps"]
        return {
            "loss": sums["nll"] / max(self.tokens, 1),
            "total_loss": sums["total"] / max(self.steps, 1),
            "aux": sums["aux"] / max(self.steps, 1),
            "router_z": sums["router_z"] / max(self.steps, 1),
            "grad_norm": sums["grad_norm"] / finite_steps if finite_steps else math.nan,
            **router_balance(self._statistics),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; JSON gives back every bit of a double. A sum that is not finite becomes its name."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "sums": {name: value if math.isfinite(value) else repr(value) for name, value in sums.items()},
            "router_statistics": self._statistics.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.tokens = int(state["steps"]), int(state["tokens"])
        for name, value in self._sums.items():
            value.fill_(float(state["sums"][name]))
        statistics = torch.tensor(state["router_statistics"], dtype=torch.int64, device=self._device)
        self._statistics = statistics.reshape(self._statistics_shape)


def router_balance(statistics: Tensor) -> dict[str, Any]:
    """Balance over all MoE layers, from router statistics int64 [L, E + 6]; empty for a dense model.

    load_max is the busiest expert's rows over the mean of its layer, the largest of all layers; 1 is perfect balance.
    """
    if statistics.numel() == 0:
        return {}
    num_experts = statistics.shape[1] - len(STATISTICS_AFTER_EXPERTS)
    rows_LE = statistics[:, :num_experts].double()
    names = dict(zip(STATISTICS_AFTER_EXPERTS, statistics[:, num_experts:].sum(0).tolist(), strict=True))
    real = max(names["real"], 1)
    load = rows_LE.max(1).values / rows_LE.mean(1).clamp(min=1e-9)
    return {
        "load_max": float(load.max()),
        "over_capacity_first": names["dropped_first"] / real,
        "over_capacity_second": names["dropped_second"] / real,
        "tokens_with_0_experts": names["with_0"] / real,
        "tokens_with_1_expert": names["with_1"] / real,
        "tokens_with_2_experts": names["with_2"] / real,
    }


class MetricsFile:
    """metrics.jsonl. After `truncate(step)` it says nothing about later steps, so a resumed run repeats none.

    The first rank writes the file; the others know as well what is in it.
    """

    def __init__(self, path: Path, ranks: Ranks = ONE_PROCESS) -> None:
        self.path, self._ranks = path, ranks
        self._written: set[tuple[str, int]] = set()

    def has(self, kind: str, step: int) -> bool:
        """Whether a record of this kind was written for the step, before or after the run was resumed."""
        return (kind, step) in self._written

    def truncate(self, step: int) -> None:
        """Drops lines of steps after `step`, and the half line that a kill may have left at the end."""
        if self._ranks.rank == 0 and self.path.exists():
            self._truncate(step)
        self._written = self._ranks.all_gather(self._written)[0]

    def _truncate(self, step: int) -> None:
        lines = ((line, _identity(line)) for line in self.path.read_bytes().splitlines(keepends=True))
        kept = []
        for line, identity in lines:
            if identity is not None and identity[1] <= step:
                kept.append(line)
                self._written.add(identity)
        hidden = self.path.with_name(f".tmp-{self.path.name}")
        hidden.write_bytes(b"".join(kept))
        fsync(hidden)
        hidden.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line. What JSON cannot say (NaN, infinity) is written as null."""
        self._written.add((record["kind"], record["step"]))
        if self._ranks.rank != 0:
            return
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Puts every line on the disk; called before a checkpoint that says these steps are done."""
        if self._ranks.rank == 0 and self.path.exists():
            fsync(self.path)


def _identity(line: bytes) -> tuple[str, int] | None:
    """Kind and step of a line, None if it is not a whole record."""
    try:
        record = json.loads(line)
        return (str(record["kind"]), int(record["step"])) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoard:
    """Writes every number of a record under its kind ("train/loss"); the tensorboard package is needed only if used."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ImportError(
                "run.tensorboard: needs the tensorboard package; pip install 'glam_ext[train]', or set it to false"
            ) from None
        self._make, self._folder = SummaryWriter, folder
        self._writer = SummaryWriter(str(folder))

    def resume_after(self, step: int) -> None:
        """What another run wrote about later steps disappears from the curves."""
        self._writer.close()
        self._writer = self._make(str(self._folder), purge_step=step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(f"{record['kind']}/{key}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


def dense_gemm_rate(dtype: torch.dtype, device: torch.device | str = "cpu", size: int = 1024) -> float:
    """FLOP/s of torch.matmul on [size, size] matrices, the best of a few: the measure of utilisation.

    Of `dtype` or, where that is faster, of float32: CPUs without instructions for bfloat16 multiply it slowly.
    """
    best = math.inf
    for candidate in {dtype, torch.float32} if dtype.itemsize < 4 else {dtype}:
        a, b = (torch.ones(size, size, dtype=candidate, device=device) for _ in range(2))
        for _ in range(5):
            start = time.perf_counter()
            torch.matmul(a, b)
            if a.device.type != "cpu":
                torch.cuda.synchronize(a.device)
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def train_line(record: Mapping[str, Any], total_steps: int) -> str:
    """The log line of a "train" record."""
    parts = [
        f"step {record['step']}/{total_steps}",
        f"{_short(record['tokens'])} tokens",
        f"loss {record['loss']:.4f}",
        f"{record['bits_per_byte']:.3f} bits/byte",
        f"grad {record['grad_norm']:.3g}",
        f"lr {record['learning_rate']:.3g}",
        f"{_short(record['tokens_per_second'])} tokens/s",
        f"{_short(record['model_flops_per_second'])}FLOP/s ({record['utilisation_of_dense_gemm']:.0%} of dense GEMM)",
    ]
    if "load_max" in record:
        parts.append(
            f"load max {record['load_max']:.2f}, over capacity {record['over_capacity_first']:.1%}/"
            f"{record['over_capacity_second']:.1%}, with 0/1/2 experts {record['tokens_with_0_experts']:.1%}/"
            f"{record['tokens_with_1_expert']:.1%}/{record['tokens_with_2_experts']:.1%}"
        )
    if record["skipped_updates"]:
        parts.append(f"skipped {record['skipped_updates']}")
    parts.append(f"ETA {duration(record['eta_seconds'])}")
    return " | ".join(parts)


def evaluation_line(record: Mapping[str, Any]) -> str:
    """The log line of an "evaluation" record."""
    return (
        f"held out after step {record['step']}: {record['nats']:.4f} nats per token, perplexity "
        f"{record['perplexity']:.2f}, {record['bits_per_byte']:.4f} bits/byte ({record['capacity']}, "
        f"{record['seconds']:.1f} s)"
    )


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(number: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}" if unit != "K" else f"{number / size:.1f}{unit}"
    return f"{number:.3g}"
