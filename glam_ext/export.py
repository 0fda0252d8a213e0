"""The TorchScript archive of a model: one file for C++ programs that link libglam_core and have no Python.

The archive is built in C++ (glam/export.h). Beside the model it carries
    config.json                     the GLaMConfig
    glam.json                       the archive's format number and the version of this library
    tokenizer.model, tokenizer.json if given: SentencePiece's model, and its vocabulary size and hash
The tokenizer goes in whole, not by name: a model is worthless with another one, which nothing but nonsense text would
reveal, and its model is small beside the weights. Any reader of TorchScript archives gets these as extra files.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from glam_ext import _C
from glam_ext.config import GLaMConfig
from glam_ext.model import GLaM

if TYPE_CHECKING:
    from glam_ext.data import Tokenizer

TOKENIZER_MODEL, TOKENIZER_DESCRIPTION = "tokenizer.model", "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class Archive:
    """A loaded archive. `module` has forward, init_cache, step and generate, on tensors as in glam/export.h."""

    module: torch.jit.ScriptModule
    config: GLaMConfig
    tokenizer: Tokenizer | None


def export_torchscript(model: GLaM, file: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> Path:
    """Writes the archive of `model` to `file`, whole or not at all, and returns the path.

    Raises ``CheckpointError`` if the file cannot be written (what was there before stays) and ``ValueError`` for a
    tokenizer with more tokens than the model.
    """
    model._check_intact()
    extra_files: dict[str, str | bytes] = {}
    if tokenizer is not None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"glam_ext.export: expected a tokenizer of at most the model's {model.config.vocab_size} tokens, got "
                f"{tokenizer.vocab_size}; use the one the model was trained with"
            )
        extra_files = {TOKENIZER_MODEL: tokenizer.model, TOKENIZER_DESCRIPTION: tokenizer.describe()}
    _C.export_torchscript(model._core, file, extra_files)
    return Path(file)


def load_archive(file: str | os.PathLike[str]) -> Archive:
    """Reads an archive as a C++ program does: format and every record's checksum first, then the module.

    `torch.jit.load` reads the same file (after `import glam_ext`, for the ops), but takes damaged weights as they are.
    Raises ``CheckpointError`` that names the file and the remedy.
    """
    module, config, extra_files = _C.load_archive(file, [TOKENIZER_MODEL, TOKENIZER_DESCRIPTION])
    tokenizer = None
    if TOKENIZER_MODEL in extra_files:
        from glam_ext.data import Tokenizer

        tokenizer = Tokenizer(extra_files[TOKENIZER_MODEL])
    # What torch.jit.load returns: the C++ module in its Python clothes.
    return Archive(torch.jit._recursive.wrap_cpp_module(module), GLaMConfig.from_json(config), tokenizer)
