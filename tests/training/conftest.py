"""Token folders of a few hundred short rows, and configurations that train on them in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from glam_ext.data import Corpus, Tokenizer, write_corpus
from glam_ext.training import TrainingConfig, load_config

SEQUENCE_LENGTH = 16


class Data(NamedTuple):
    train: Path
    heldout: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Documents of different lengths, so that rows hold several segments and some padding."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(Corpus(["austen:heldout"]))
    for name, start, end in (("train", 0, 12_000), ("heldout", 20_000, 22_000)):
        pieces = text[start:end].split("\n\n")
        lines = [json.dumps({"text": piece}) for piece in pieces if piece]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    tokenizer = Tokenizer.train(Corpus([folder / "train.jsonl"]), 512)
    for name in ("train", "heldout"):
        write_corpus(folder / name, Corpus([folder / f"{name}.jsonl"]), tokenizer, SEQUENCE_LENGTH)
    return Data(folder / "train", folder / "heldout", tokenizer)


@pytest.fixture
def config_file(tmp_path: Path, data: Data) -> Path:
    """Six steps of four rows, one line per step, in the run folder `tmp_path/runs/run`."""
    file = tmp_path / "run.toml"
    file.write_text(f"""
[run]
name = "run"
folder = "{tmp_path / "runs"}"
steps = 6
log_interval = 1
[model]
preset = "tiny"
compute_dtype = "float32"
[data]
train = "{data.train}"
heldout = "{data.heldout}"
batch_size = 4
[optimizer]
name = "adamw"
clip_norm = 1.0
[schedule]
kind = "cosine"
learning_rate = 1e-3
warmup_steps = 2
[checkpoint]
interval = 0
[evaluation]
interval = 3
""")
    return file


@pytest.fixture
def make_config(config_file: Path) -> Callable[..., TrainingConfig]:
    def make(*overrides: str) -> TrainingConfig:
        return load_config(config_file, overrides)

    return make
