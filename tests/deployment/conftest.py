"""A small model with every kind of part, its checkpoint folder, its tokenizer, its archive and the C++ program."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from glam_ext.checkpoint import save_checkpoint
from glam_ext.config import GLaMConfig
from glam_ext.data import Corpus, Tokenizer
from glam_ext.export import export_torchscript
from glam_ext.model import GLaM
from tests.examples import Program, build_example

CONFIG = GLaMConfig.preset("tiny", vocab_size=520)


def sharp_model(config: GLaMConfig, seed: int = 0) -> GLaM:
    """A model whose output differs clearly between tokens: at initialisation greedy text only repeats its prompt."""
    model = GLaM(config, seed=seed).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".wo", ".o")):
                parameter.mul_(6)
    return model


@pytest.fixture(scope="session")
def model() -> GLaM:
    return sharp_model(CONFIG)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Of 512 tokens, 8 fewer than the model knows."""
    text = "\n".join(line for document in Corpus(["austen:heldout"]) for line in document.splitlines()[:400])
    return Tokenizer.train([text], 512)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """The same model in every form, with its tokenizer."""

    model: GLaM
    run: Path
    checkpoint: Path
    archive: Path
    tokenizer_file: Path
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def deployed(model: GLaM, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    run = tmp_path_factory.mktemp("run")
    tokenizer.save(run / "tokenizer.model")
    trainer = {"tokenizer_hash": tokenizer.hash}
    checkpoint = save_checkpoint(run / "checkpoints", 7, model.config, model.state_dict(), {}, trainer, keep=0)
    archive = export_torchscript(model, run / "model.pt", tokenizer)
    return Deployed(model, run, checkpoint, archive, run / "tokenizer.model", tokenizer)


@pytest.fixture(scope="session")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build_example("deploy_cpp", "deploy", tmp_path_factory.mktemp("deploy") / "build")


@pytest.fixture(scope="session")
def has_sentencepiece(deploy: Program) -> bool:
    return bool(re.search(r"^SENTENCEPIECE_FOUND:INTERNAL=1$", deploy.cmake_cache, re.MULTILINE))
