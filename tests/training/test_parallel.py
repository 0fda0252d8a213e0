"""Training under torchrun: the numbers of one process, checkpoints for any layout, and a rank that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from glam_ext import GLaM
from glam_ext.checkpoint import Checkpoint, load_checkpoint
from glam_ext.training import TrainingConfig, TrainingRun
from tests.guards import PROCESS_SECONDS

# Adafactor, float32 and no schedule that looks at the number of steps.
COMMON = (
    "--optimizer.name=adafactor",
    "--optimizer.options.min_factored=16",
    "--schedule.kind=constant",
    "--schedule.learning_rate=0.01",
    "--schedule.warmup_steps=0",
    "--model.capacity_factor=1.0",
    "--run.threads=1",
)


def torchrun(processes: int, config: Path, *overrides: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [f"--max-restarts={restarts}", "-m", "glam_ext.recipes.pretrain", str(config), *COMMON, *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=PROCESS_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the launcher takes its workers with it
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"no end after {PROCESS_SECONDS:.0f} s: {output}")
    assert process.returncode == status, output
    return output


def metrics(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def assert_alike(actual: Checkpoint, expected: Checkpoint) -> None:
    assert actual.trainer["data"] == expected.trainer["data"]
    assert actual.trainer["tokens"] == expected.trainer["tokens"]
    for kind in ("model", "optimizer"):
        found, wanted = getattr(actual, kind), getattr(expected, kind)
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_lines(actual: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> None:
    assert [line["step"] for line in actual] == [line["step"] for line in expected]
    for line, wanted in zip(actual, expected, strict=True):
        assert line["tokens"] == wanted["tokens"]
        for key in ("loss", "total_loss", "aux", "grad_norm", "load_max", "over_capacity_second"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-4), f"step {line['step']}: {key}"


@pytest.fixture
def alone(tmp_path: Path, make_config: Callable[..., TrainingConfig]) -> Path:
    """The run folder of one process, eight steps."""
    run = TrainingRun(make_config(*COMMON, "--run.name=alone", "--run.steps=8"), log=lambda _: None)
    assert run.train() == 0
    return run.folder


def test_any_layout_goes_on_from_any_other(tmp_path: Path, config_file: Path, alone: Path) -> None:
    """4 -> 2 -> 1 -> 4 processes, two steps each, are eight steps of one process."""
    layouts = [(4, 2, 2), (2, 2, 4), (1, 1, 6), (4, 4, 8)]  # processes, expert, steps in all
    for processes, expert, steps in layouts:
        output = finish(torchrun(processes, config_file, f"--parallel.expert={expert}", f"--run.steps={steps}"))
        if steps > 2:
            assert f"step {steps - 2}, " in output
    run = tmp_path / "runs" / "run"
    assert_same_lines(metrics(run), metrics(alone))
    last, before = metrics(run, "evaluation")[-1], metrics(alone, "evaluation")[-1]
    assert last["num_tokens"] == before["num_tokens"]
    assert last["nats"] == pytest.approx(before["nats"], rel=1e-4)
    assert_alike(load_checkpoint(run), load_checkpoint(alone))

    # The last folder is in four shards; C++ and `glam verify` read it too.
    newest = run / "checkpoints" / "step-000008"
    assert len(list(newest.glob("model-*-of-00004.safetensors"))) == 4
    checkpoint = load_checkpoint(newest)
    for name, tensor in GLaM.from_checkpoint(newest).state_dict().items():
        assert torch.equal(tensor, checkpoint.model[name]), name
    verified = subprocess.run([sys.executable, "-m", "glam_ext", "verify", newest], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout


def test_impossible_layouts_are_refused(config_file: Path) -> None:
    output = finish(torchrun(2, config_file, "--parallel.expert=4"), status=1)
    assert "parallel.expert: expected a divisor of the 2 processes, got 4" in output
    output = finish(torchrun(2, config_file, "--data.batch_size=3"), status=1)
    assert "data.batch_size: expected a multiple of the 2 processes, got 3" in output


def workers_of(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"pretrain" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], bool], seconds: float = PROCESS_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_rank_is_named_and_the_run_goes_on(tmp_path: Path, config_file: Path) -> None:
    process = torchrun(
        2, config_file, "--parallel.expert=2", "--run.steps=200", "--checkpoint.interval=5", "--evaluation.interval=0",
        restarts=1,
    )  # fmt: skip
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    wait_for(lambda: (checkpoints / "step-000005" / "COMPLETE").exists())
    victim = workers_of(process)[1]
    os.kill(victim, signal.SIGKILL)
    output = finish(process)
    assert f"rank 1 (process {victim} on " in output, output
    assert "no sign of life" in output
    resumed = [line for line in output.splitlines() if line.startswith("resumed ")]
    assert len(resumed) == 1
    assert (checkpoints / "step-000200" / "COMPLETE").exists()
    lines = metrics(tmp_path / "runs" / "run")
    assert [line["step"] for line in lines] == list(range(1, 201))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path, config_file: Path) -> None:
    arguments = ("--parallel.expert=2", "--run.steps=200", "--evaluation.interval=0")
    process = torchrun(2, config_file, *arguments)
    run = tmp_path / "runs" / "run"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) > 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PROCESS_SECONDS)
    assert "the same command goes on from here" in output
    (saved,) = (run / "checkpoints").iterdir()
    assert (saved / "COMPLETE").exists()
    output = finish(torchrun(2, config_file, *arguments))
    assert "resumed " in output
    assert [line["step"] for line in metrics(run)] == list(range(1, 201))
