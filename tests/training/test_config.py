"""The TOML schema: what is read is what was written, and every mistake is named together with its remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from glam_ext import GLaMConfig
from glam_ext.training import ConfigError, TrainingRun, decode, load_config, to_tables, to_toml

CONFIGS = sorted(Path(__file__).parents[2].joinpath("recipes", "configs").glob("*.toml"))

MINIMAL = """
[run]
name = "a"
steps = 10
[model]
preset = "tiny"
[data]
train = "somewhere"
batch_size = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    return path


def append(file: Path, text: str) -> Path:
    file.write_text(file.read_text() + text)
    return file


def test_defaults_are_the_papers(file):
    config = load_config(file)
    assert config.model == GLaMConfig.preset("tiny")
    assert (config.optimizer.name, config.optimizer.clip_norm, config.schedule.kind) == ("adafactor", 0.0, "glam")
    assert (config.schedule.multiplier, config.schedule.constant_steps) == (1.0, 10_000)
    assert (config.micro_batch_size(), config.evaluation_batch_size()) == (4, 4)
    assert config.run_folder == Path("runs/a")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_possible_and_come_back_whole(path, tmp_path):
    config = load_config(path)
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert load_config(again) == config


def test_there_are_shipped_configurations():
    assert {"tiny", "debug", "glam_0.1b_64e"} <= {path.stem for path in CONFIGS}


def test_unusual_values_come_back(file):
    append(file, '[optimizer]\nname = "SGD"\n[optimizer.options]\nmomentum = 0.9\n"a key" = [1, 2.5, "x\\ty"]\n')
    config = load_config(file, ["--model.eval_capacity_factor=1.5", '--run.name=a "quoted" \\ name'.replace("\\", "-")])
    assert config.model.eval_capacity_factor == 1.5
    assert decode(to_tables(config)) == config
    file.write_text(to_toml(config))
    assert load_config(file) == config


def test_overrides_are_read_by_the_type_of_their_field(file):
    config = load_config(
        file,
        [
            "--run.steps=1_000",
            "--run.name=true",  # a string, whatever it looks like
            "--data.shuffle=false",
            "--schedule.multiplier=2",
            "--model.num_experts=8",
            "--optimizer.name=adamw",
            "--optimizer.options.betas=[0.8, 0.9]",
            "--optimizer.options.mode=text",
            "--run.steps=20",
        ],
    )
    assert config.run == dataclasses.replace(config.run, steps=20, name="true")
    assert config.data.shuffle is False
    assert config.schedule.multiplier == 2.0
    assert isinstance(config.schedule.multiplier, float)
    assert config.model.num_experts == 8
    assert config.optimizer.options == {"betas": [0.8, 0.9], "mode": "text"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--run.stepz=3", r'--run.stepz=3: unknown name "stepz"; did you mean "steps"\?'),
        ("--rum.steps=3", r'unknown name "rum"; did you mean "run"\?'),
        ("--run.steps", r"--run.steps: expected --section.field=value"),
        ("run.steps=3", r"run.steps=3: expected --section.field=value"),
        ("--run=3", r"--run=3: expected --section.field=value"),
        ("--run.steps.more=3", r"expected --run.steps=value"),
        ("--optimizer.options=3", r"expected --optimizer.options.KEY=value"),
        ("--run.steps=many", r"--run.steps=many: expected a number or true or false after the =, got 'many'"),
        ("--run.steps=1\nrun.name='x'", r"expected a number"),
        ("--run.steps=2.5", r"run.steps: expected an integer, got 2.5"),
        ("--run.steps=true", r"run.steps: expected an integer, got True"),
        ("--data.shuffle=1", r"data.shuffle: expected true or false, got 1"),
        ("--schedule.multiplier=nan", r"schedule.multiplier: expected a finite number, got nan"),
        ("--model.num_exprts=3", r'unknown name "num_exprts"; did you mean "num_experts"\?'),
        ("--model.num_experts=-2", r"\[model\] .*num_experts"),
        ("--model.preset=huge", r"\[model\] .*huge"),
        ("--run.steps=0", r"run.steps: expected at least 1, got 0"),
        ("--run.name=a/b", r"run.name: expected the name of a folder, without slashes, got 'a/b'"),
        ("--run.device=tpu", r'run.device: expected one of "cpu", "cuda", got "tpu"'),
        ("--run.seed=-1", r"run.seed: expected in \[0, 2\^63\), got -1"),
        ("--parallel.expert=3", r"parallel.expert: expected a divisor of model.num_experts = 4, got 3"),
        ("--parallel.expert=0", r"parallel.expert: expected at least 1, got 0"),
        ("--data.micro_batch_size=3", r"data.micro_batch_size: expected a divisor of data.batch_size = 4, got 3"),
        ("--schedule.learning_rate=0.1", r'schedule.learning_rate: has no meaning for the kind "glam"; remove it'),
        ("--schedule.kind=linear", r'schedule.kind: expected one of "glam", "constant", "cosine", "inverse_sqrt"'),
        ("--schedule.kind=cosine", r'schedule.learning_rate: expected above 0 for "cosine", got 0'),
        ("--loss.denominator=rows", r'loss.denominator: expected one of "tokens", "positions", got "rows"'),
        ("--checkpoint.keep=-1", r"checkpoint.keep: expected at least 0, got -1"),
    ],
)
def test_mistakes_are_named_with_their_remedy(file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(config_file):
    with pytest.raises(
        ConfigError, match=r'run.device: is "cuda", but (glam_ext was built without|torch finds 0 GPUs)'
    ):
        TrainingRun(load_config(config_file, ["--run.device=cuda"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optimiser]\n", r'a.toml: \[optimiser\]: unknown name "optimiser"; did you mean "optimizer"\?'),
        ("[checkpoint]\nkeep = '2'\n", r"a.toml: checkpoint.keep: expected an integer, got '2'"),
        ("[schedule]\nkind = 3\n", r"a.toml: schedule.kind: expected a string, got 3"),
        ("[optimizer]\noptions = 3\n", r"a.toml: optimizer.options: expected a table, got 3"),
        ("[[loss]]\n", r"a.toml: loss: expected a section \[loss\]"),
        ("[broken\n", r"a.toml: is not TOML: .*line 10"),
    ],
)
def test_mistakes_in_the_file_name_the_file(file, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(append(file, text))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('name = "a"', r"run.name: missing; write it under \[run\]"),
        ('[model]\npreset = "tiny"', r"\[model\]: missing; write it"),
        ('preset = "tiny"', r"\[model\] .*num_layers"),
        ('[data]\ntrain = "somewhere"\nbatch_size = 4', r"data.train: missing; write it under \[data\]"),
    ],
)
def test_what_is_missing_is_named(file, line, message):
    assert line in MINIMAL
    file.write_text(MINIMAL.replace(line, ""))
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.toml: cannot be read: .*give the path of a TOML file"):
        load_config(tmp_path / "nowhere.toml")


def test_the_data_must_fit_the_model(file):
    config = load_config(file)
    config.check_data("there", 512, 16)
    with pytest.raises(ConfigError, match=r"at least the 600 ids of there, got 512; set model.vocab_size = 600"):
        config.check_data("there", 600, 16)


def test_a_routing_group_cannot_cross_a_micro_batch(file):
    config = load_config(file, ["--model.group_size=32", "--data.micro_batch_size=2"])
    config.check_data("there", 512, 16)
    with pytest.raises(ConfigError, match=r"model.group_size: expected a divisor of data.micro_batch_size \* sequence"):
        config.check_data("there", 512, 24)
    config = load_config(file, ["--model.group_size=64", "--evaluation.batch_size=2"])
    with pytest.raises(ConfigError, match=r"evaluation.batch_size \* sequence length = 2 \* 16, got 64"):
        config.check_data("there", 512, 16)


def test_processes_share_batches_and_experts_evenly(file: Path) -> None:
    config = load_config(file, ["--parallel.expert=2", "--data.micro_batch_size=2"])
    config.check_world(2)
    assert (config.micro_batch_size(2), config.evaluation_batch_size(2)) == (2, 4)
    for world_size, text in (
        (3, "data.batch_size: expected a multiple of the 3 processes, got 4"),
        (4, "data.micro_batch_size: expected a divisor of each process's share of data.batch_size, 1, got 2"),
        (1, "parallel.expert: expected a divisor of the 1 processes, got 2"),
    ):
        with pytest.raises(ConfigError, match=re.escape(text)):
            config.check_world(world_size)
    with pytest.raises(ConfigError, match=r"exchange_chunks: expected a divisor of the 2 experts of a process, got 3"):
        load_config(file, ["--parallel.expert=2", "--parallel.exchange_chunks=3"])
