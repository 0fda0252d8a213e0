"""A small model with every kind of part, its checkpoint folder, its tokenizer, its archive and the C++ program."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glam_ext
from glam_ext.checkpoint import save_checkpoint
from glam_ext.config import GLaMConfig
from glam_ext.data import Corpus, Tokenizer
from glam_ext.export import export_torchscript
from glam_ext.model import GLaM

ROOT = Path(__file__).parents[2]
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


@dataclasses.dataclass(frozen=True)
class Program:
    """The built examples/deploy_cpp, run with nothing of Python in its environment."""

    path: Path
    has_sentencepiece: bool

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.path), *map(str, arguments)]
        clean = {"PATH": "/nowhere", **environment}
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd="/", timeout=120)


def succeed(*command: object, **options: object) -> str:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Built outside the tree, with the package's CMake files and no other help."""
    build = tmp_path_factory.mktemp("deploy") / "build"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PATH": path}
    settings = [f"-DCMAKE_PREFIX_PATH={glam_ext.cmake_prefix_path}"]
    if shutil.which("ccache"):
        settings.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    source = ROOT / "examples" / "deploy_cpp"
    succeed("cmake", "-G", "Ninja", "-S", source, "-B", build, *settings, env=environment)
    succeed("cmake", "--build", build, "--parallel", "2", env=environment)
    cache = (build / "CMakeCache.txt").read_text()
    return Program(build / "deploy", bool(re.search(r"^SENTENCEPIECE_FOUND:INTERNAL=1$", cache, re.MULTILINE)))
