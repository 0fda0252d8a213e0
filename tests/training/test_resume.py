"""A run that was stopped, killed or never interrupted ends in the same bits and has written the same lines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glam_ext.checkpoint import load_checkpoint, step_folders
from glam_ext.recipes import pretrain
from glam_ext.training import EXIT_INTERRUPTED, ConfigError, TrainingConfig, TrainingRun, load_config

TIMES = ("tokens_per_second", "model_flops_per_second", "utilisation_of_dense_gemm", "eta_seconds", "seconds")
VARIANTS = {
    "adamw": (),
    "adamw-micro-batches-recompute": ("--data.micro_batch_size=2", "--model.recompute=true"),
    "adafactor-bf16": ("--optimizer.name=adafactor", "--model.compute_dtype=bfloat16"),
    "adafactor-glam": ("--optimizer.name=adafactor", "--schedule.kind=glam", "--schedule.learning_rate=0",
                       "--schedule.warmup_steps=0"),
    "random-routing": ("--model.second_policy=random", "--model.second_threshold=0.5", "--model.router_jitter=0.1"),
    "lines-of-four-steps": ("--run.log_interval=4",),
}  # fmt: skip


def run_once(config: TrainingConfig, stop_after: str = "") -> tuple[int, TrainingRun, list[str]]:
    """Resumes and trains in this process; a SIGTERM comes right after the first line that matches `stop_after`."""
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if stop_after and re.match(stop_after, line):
            os.kill(os.getpid(), signal.SIGTERM)

    run = TrainingRun(config, log)
    run.resume()
    return run.train(), run, lines


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records(folder)]


def assert_same_runs(got: Path, expected: Path) -> None:
    """The last checkpoints agree in every tensor and number, the metrics in everything but times."""
    a, b = load_checkpoint(got), load_checkpoint(expected)
    assert a.step == b.step == 6
    for mine, theirs in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert mine.keys() == theirs.keys()
        assert mine
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name
    assert a.trainer == b.trainer
    assert without_times(got) == without_times(expected)


@pytest.mark.parametrize("overrides", [VARIANTS["adamw"], VARIANTS["adafactor-bf16"]], ids=["adamw", "adafactor-bf16"])
def test_the_number_of_threads_changes_no_bit(make_config, overrides):
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            names = f"--run.name={count}", f"--run.threads={count}"
            config = make_config(*overrides, "--optimizer.clip_norm=1.0", *names)
            assert run_once(config)[0] == 0
            runs.append(config.run_folder)
    finally:
        torch.set_num_threads(threads)
    assert_same_runs(runs[1], runs[0])
    assert_same_runs(runs[2], runs[0])


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_stopped_run_ends_in_the_bits_of_an_unbroken_one(make_config, overrides):
    straight, broken = (make_config(*overrides, f"--run.name={name}") for name in ("straight", "broken"))
    status, run, _ = run_once(straight)
    assert status == 0
    assert run.last_evaluation is not None

    # With a line per step the signal comes before the evaluation of step 3, which is then left to the second start.
    stop_after = r"held out after step 3" if "--run.log_interval=4" in overrides else r"step 3/6"
    status, run, lines = run_once(broken, stop_after)
    assert status == EXIT_INTERRUPTED
    assert run.step == 3
    assert lines[-1] == "stopped by SIGTERM after step 3; the same command goes on from here"
    assert [path.name for path in step_folders(broken.run_folder / "checkpoints")] == ["step-000003"]

    torch.manual_seed(12345)  # what other code does to the generator is put right by the checkpoint
    status, run, lines = run_once(broken)
    assert status == 0
    assert any(line.startswith("resumed ") and "step 3" in line for line in lines)
    assert_same_runs(broken.run_folder, straight.run_folder)


def test_train_alone_opens_the_run_folder_and_resumes(make_config):
    """`resume` need not be called: a run by itself has its folder, and another start of it goes on."""
    config = make_config("--checkpoint.interval=2")
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if line.startswith("saved"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert TrainingRun(config, log).train() == EXIT_INTERRUPTED
    assert load_config(config.run_folder / "config.toml") == config
    stopped_at = load_checkpoint(config.run_folder / "checkpoints").step
    assert stopped_at == 2
    run = TrainingRun(config, lines.append)
    assert run.train() == 0
    assert any(line.startswith("resumed") for line in lines)
    unbroken = make_config("--run.name=unbroken")
    run_once(unbroken)
    assert_same_runs(config.run_folder, unbroken.run_folder)


def test_the_loss_falls(make_config):
    config = make_config("--run.steps=40", "--run.log_interval=10", "--schedule.learning_rate=1e-2")
    run_once(config)
    train = [record["loss"] for record in records(config.run_folder) if record["kind"] == "train"]
    assert len(train) == 4
    assert train[-1] < train[0] - 0.5


def test_signals_and_kills_of_the_program_lose_no_step_and_repeat_none(config_file, make_config, tmp_path):
    """SIGTERM after step 2, SIGKILL after step 5 when the newest checkpoint is of step 4, then to the end."""
    straight = make_config("--run.name=straight", "--checkpoint.interval=2")
    assert run_once(straight)[0] == 0
    command = [sys.executable, "-m", "glam_ext.recipes.pretrain", str(config_file), "--checkpoint.interval=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}

    def start(number: signal.Signals | None, after: str) -> tuple[int, str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=environment, **pipes) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if number is not None and line.startswith(after):
                    process.send_signal(number)
            return process.wait(), "".join(lines)

    status, output = start(signal.SIGTERM, "step 2/6")
    assert status == EXIT_INTERRUPTED, output
    assert "stopped by SIGTERM after step" in output
    assert "[optimizer]" in output  # the resolved configuration
    folder = tmp_path / "runs" / "run"
    stopped_at = load_checkpoint(folder).step
    assert 2 <= stopped_at < 5, "the program did not notice the signal within two steps"

    status, output = start(signal.SIGKILL, "step 5/6")
    assert status == -signal.SIGKILL, output
    assert load_checkpoint(folder).step == 4
    assert max(record["step"] for record in records(folder)) >= 5

    status, output = start(None, "")
    assert status == 0, output
    assert_same_runs(folder, straight.run_folder)
    assert [record["step"] for record in records(folder) if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert load_config(folder / "config.toml") == load_config(config_file, ["--checkpoint.interval=2"])

    # Finished: nothing is left to do, and doing it again changes nothing.
    assert run_once(load_config(config_file, ["--checkpoint.interval=2"]))[0] == 0
    assert_same_runs(folder, straight.run_folder)


def test_a_half_line_and_lines_without_a_checkpoint_are_taken_back(make_config):
    config = make_config()
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "train", "st')
    assert run_once(config)[0] == 0
    assert [r["step"] for r in records(config.run_folder) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_a_save_that_never_finished_does_not_stop_the_next_start(make_config):
    config = make_config()
    (config.run_folder / "checkpoints" / "step-000002").mkdir(parents=True)
    status, _, lines = run_once(config)
    assert status == 0
    assert not any(line.startswith("resumed") for line in lines)


def test_skipped_updates_are_counted_and_training_goes_on(make_config, monkeypatch):
    from glam_ext.training import loop

    accumulate = loop.accumulate_gradients

    def poisoned(model, *arguments, step, **options):
        sums = accumulate(model, *arguments, step=step, **options)
        if step == 2:
            model.get_parameter("final_norm.scale").grad[0] = torch.nan
        return sums

    monkeypatch.setattr(loop, "accumulate_gradients", poisoned)
    config = make_config()
    status, run, lines = run_once(config)
    assert status == 0
    train = [record for record in records(config.run_folder) if record["kind"] == "train"]
    assert [record["skipped_updates"] for record in train] == [0, 0, 1, 1, 1, 1]
    assert [record["grad_norm"] is None for record in train] == [False, False, True, False, False, False]
    assert "| skipped 1 |" in next(line for line in lines if line.startswith("step 3/6"))
    assert all(torch.isfinite(parameter).all() for parameter in run.model.parameters())
    assert load_checkpoint(config.run_folder).trainer["skipped_updates"] == 1


def resume_with(make_config: Callable[..., TrainingConfig], *overrides: str) -> bool:
    return TrainingRun(make_config(*overrides), lambda _: None).resume()


def test_what_does_not_fit_the_checkpoint_is_refused(make_config):
    run_once(make_config(), r"step 3/6")
    cases = [
        ("--model.aux_loss_weight=0.5", r"model.aux_loss_weight: is 0.5 here and 0.01 in .*step-000003; restore it"),
        ("--optimizer.name=adafactor", r'optimizer.name: is "adafactor" here and "adamw" in .*step-000003; restore it'),
        ("--run.steps=2", r"run.steps: is 2, below the 3 steps .*; raise it"),
        ("--run.seed=9", r"cannot resume, seed is 9 here and 0 in the checkpoint"),
    ]
    for override, message in cases:
        with pytest.raises(ValueError, match=message):
            resume_with(make_config, override, *(("--schedule.warmup_steps=0",) if "steps" in override else ()))
    assert resume_with(make_config, "--model.recompute=true", "--run.steps=8", "--run.log_interval=2")


def test_going_back_to_a_named_step_asks_to_move_the_newer_ones(make_config, tmp_path):
    config = make_config("--checkpoint.interval=2", "--checkpoint.keep=0")
    run_once(config)
    checkpoints = config.run_folder / "checkpoints"
    back = f"--checkpoint.resume_from={checkpoints / 'step-000002'}"
    with pytest.raises(ConfigError, match=r"has newer checkpoints \(step-000004, step-000006\); move them away"):
        resume_with(make_config, back)
    for name in ("step-000004", "step-000006"):
        (checkpoints / name).rename(tmp_path / name)
    status, run, lines = run_once(make_config(back, "--checkpoint.interval=2", "--checkpoint.keep=0"))
    assert status == 0
    assert any(line.startswith("resumed") and "step 2," in line for line in lines)
    assert torch.equal(
        load_checkpoint(tmp_path / "step-000006").model["embedding.weight"],
        load_checkpoint(run.folder).model["embedding.weight"],
    )
    with pytest.raises(ConfigError, match=r"resume_from: expected a folder called step-000123, got somewhere"):
        resume_with(make_config, "--checkpoint.resume_from=somewhere")


def test_a_changed_setting_is_told(make_config):
    run_once(make_config(), r"step 3/6")
    lines: list[str] = []
    TrainingRun(make_config("--schedule.learning_rate=2e-3"), lines.append).resume()
    assert "changed since the run's last start: schedule.learning_rate: 0.001 -> 0.002" in lines


def test_the_program_says_in_one_line_what_is_wrong(config_file, capsys):
    for override, message in (
        ("--data.train=nowhere", "glam train: nowhere/manifest.json: no such file"),
        ("--model.vocab_size=300", "glam train: model.vocab_size: expected at least the 512 ids of"),
        ("--run.stepz=1", 'glam train: --run.stepz=1: unknown name "stepz"'),
    ):
        assert pretrain.main([str(config_file), override]) == 1
        error = capsys.readouterr().err
        assert error.startswith(message), error
        assert error.count("\n") == 1


def test_a_dry_run_leaves_nothing_behind(config_file, tmp_path, capsys):
    assert pretrain.main([str(config_file), "--dry-run"]) == 0
    assert "the configuration is possible" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_tensorboard_gets_the_same_numbers(make_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config("--run.tensorboard=true")
    run_once(config, r"step 3/6")
    run_once(config)
    events = EventAccumulator(str(config.run_folder / "tb"))
    events.Reload()
    losses = [r["loss"] for r in records(config.run_folder) if r["kind"] == "train"]
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5, 6]
    assert [scalar.value for scalar in scalars] == pytest.approx(losses, rel=1e-6)
