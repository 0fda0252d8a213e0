"""examples/train_cpp, built outside the tree and run without Python: the losses and weights of the Python trainer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from glam_ext import GLaM
from glam_ext.checkpoint import load_checkpoint, verify_checkpoint
from glam_ext.training import TrainingRun, load_config
from tests.distributed.processes import free_port
from tests.examples import Program, build_example, finish
from tests.guards import PROCESS_SECONDS
from tests.training.conftest import Data
from tests.training.test_parallel import metrics

STEPS = 6
LINE = re.compile(r"step (\d+)/6  loss (\S+)  aux (\S+)  grad_norm (\S+)  \d+ tokens/s")
RECIPE = (
    "--optimizer.name=adafactor",
    "--optimizer.options.min_factored=16",
    "--optimizer.clip_norm=0.5",
    "--data.micro_batch_size=2",
    "--run.seed=3",
    f"--run.steps={STEPS}",
)


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build_example("train_cpp", "train", tmp_path_factory.mktemp("train") / "build")


@pytest.fixture(params=[1.0, 0.0], ids=["capped", "dropless"])
def capacity(request: pytest.FixtureRequest) -> str:
    return f"--model.capacity_factor={request.param}"


@pytest.fixture
def recipe(config_file: Path, capacity: str) -> tuple[Path, list[object]]:
    """The run folder of the Python trainer, and the same run for the program."""
    schedule = '[schedule]\nkind = "glam"\nmultiplier = 0.5\nconstant_steps = 200\n'
    config_file.write_text(re.sub(r"\[schedule\][^\[]*", schedule, config_file.read_text()))
    config = load_config(config_file, [*RECIPE, capacity, "--run.threads=1"])
    run = TrainingRun(config, log=lambda _: None)
    assert run.train() == 0
    (newest,) = (run.folder / "checkpoints").glob("step-*")
    arguments = [config.data.train, "--config", newest / "config.json", "--steps", STEPS, "--log-interval", 1]
    arguments += ["--batch-size", config.data.batch_size, "--micro-batch-size", 2, "--seed", 3]
    arguments += ["--min-factored", 16, "--clip-norm", 0.5, "--multiplier", 0.5, "--constant-steps", 200]
    return run.folder, arguments


def lines(output: str) -> list[tuple[float, float, float]]:
    found = [LINE.fullmatch(line) for line in output.splitlines() if line.startswith("step")]
    assert [match and match[1] for match in found] == [str(step) for step in range(1, STEPS + 1)], output
    return [(float(match[2]), float(match[3]), float(match[4])) for match in found if match]


def expected_lines(run: Path) -> list[tuple[float, float, float]]:
    return [(record["loss"], record["aux"], record["grad_norm"]) for record in metrics(run)]


def start_ranks(program: Program, arguments: Sequence[object], world_size: int) -> list[subprocess.Popen[str]]:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        program.start(*arguments, "--threads", 1, **place, RANK=str(rank), WORLD_SIZE=str(world_size))
        for rank in range(world_size)
    ]


def test_alone_to_the_bit(program: Program, recipe: tuple[Path, list[object]], tmp_path: Path) -> None:
    run, arguments = recipe
    out = tmp_path / "trained"
    result = program(*arguments, "--threads", 2, "--out", out)
    assert result.returncode == 0, result.stderr
    for found, expected in zip(lines(result.stdout), expected_lines(run), strict=True):
        assert found == tuple(float(f"{value:.9f}") for value in expected)
    expected_weights = load_checkpoint(run).model
    weights = GLaM.from_checkpoint(out).state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    assert load_checkpoint(out).trainer["tokenizer_hash"] == load_checkpoint(run).trainer["tokenizer_hash"]


@pytest.mark.parametrize(("world_size", "expert"), [(2, 1), (2, 2), (4, 2)])
def test_several_processes_are_one(
    program: Program, recipe: tuple[Path, list[object]], tmp_path: Path, world_size: int, expert: int
) -> None:
    run, arguments = recipe
    if world_size == 4:  # one row for each
        arguments[arguments.index("--micro-batch-size") + 1] = 1
    out = tmp_path / "trained"
    ranks = start_ranks(program, [*arguments, "--expert", expert, "--out", out], world_size)
    results = [finish(rank) for rank in ranks]
    assert [result.returncode for result in results] == [0] * world_size, [result.stderr for result in results]
    assert all(not result.stdout for result in results[1:])
    for found, expected in zip(lines(results[0].stdout), expected_lines(run), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)

    # Each process wrote its own experts, and together they are the model.
    files = verify_checkpoint(out).tensor_files("model")
    assert [file.name for file in files] == [
        f"model-{rank + 1:05d}-of-{world_size:05d}.safetensors" for rank in range(world_size)
    ]
    expected_weights = load_checkpoint(run).model
    for name, weight in GLaM.from_checkpoint(out).state_dict().items():
        torch.testing.assert_close(
            weight, expected_weights[name], rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_under_torchrun(program: Program, data: Data, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--standalone", "--nproc-per-node=2"]
    arguments = [data.train, "--steps", STEPS, "--batch-size", 4, "--log-interval", 1, "--expert", 2]
    command += [str(argument) for argument in (program.path, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert result.returncode == 0, result.stderr
    lines(result.stdout)


def test_no_python_is_loaded(program: Program, data: Data, tmp_path: Path) -> None:
    program.assert_no_python(tmp_path / "log", data.train, "--steps", 1, "--batch-size", 2)


def test_bad_input_ends_in_one_line(program: Program, data: Data, tmp_path: Path) -> None:
    train = data.train

    def refused(message: str, *arguments: object, **environment: str) -> None:
        result = program(*arguments, **environment)
        assert result.returncode == 1
        assert not result.stdout
        assert re.fullmatch(rf"train: .*{message}.*\n", result.stderr), result.stderr

    refused("expected a token folder; see --help")
    refused("unknown argument --lr; see --help", train, "--lr", 1)
    refused('expected a number after --steps, got "many"', train, "--steps", "many")
    refused("expected a value after --steps", train, "--steps")
    refused('unknown preset "huge"', train, "--preset", "huge")
    refused("nothing.json: cannot be read; check the path", train, "--config", tmp_path / "nothing.json")
    refused("nothing/manifest.json: no such file; expected a token folder", tmp_path / "nothing")
    refused(
        "--micro-batch-size to divide the 4 rows of a process, got 3",
        train,
        "--batch-size",
        4,
        "--micro-batch-size",
        3,
    )
    refused("expected --expert to divide the 1 processes, got 2", train, "--expert", 2)
    refused("expected RANK below WORLD_SIZE, got 2 and 2", train, RANK="2", WORLD_SIZE="2")
    refused('expected the environment\'s RANK to be a number, got "first"', train, RANK="first")
    refused("expected --out not to exist yet", train, "--out", tmp_path)

    damaged = tmp_path / "damaged"
    shutil.copytree(train, damaged)
    content = bytearray((damaged / "tokens.bin").read_bytes())
    content[100] ^= 1
    (damaged / "tokens.bin").write_bytes(content)
    refused("damaged/tokens.bin: damaged, its content does not match the hash in manifest.json", damaged)
    (damaged / "tokens.bin").write_bytes(content[:-2])
    refused(rf"damaged/tokens.bin: expected {len(content)} bytes, got {len(content) - 2}", damaged)
    (damaged / "tokens.bin").unlink()
    refused("damaged/tokens.bin: missing", damaged)
    manifest = damaged / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_rows"', '"num_row"'))
    refused("damaged/manifest.json: damaged or edited, it does not match its own hash", damaged)


def test_a_full_disk_leaves_nothing(program: Program, data: Data, small_disk: Path) -> None:
    """On every rank, and with a message from the one whose disk it was."""
    (small_disk / "filler").write_bytes(bytes(600_000))
    arguments = [data.train, "--steps", 1, "--batch-size", 2, "--expert", 2, "--out", small_disk / "trained"]
    results = [finish(rank) for rank in start_ranks(program, arguments, 2)]
    assert [result.returncode for result in results] == [1, 1]
    assert any(
        "No space left on device; free some space or choose another folder" in result.stderr for result in results
    )
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
