"""A small checkpoint's content and the two readers, so that every test of damage asks both languages."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from glam_ext import _C
from glam_ext.checkpoint import load_checkpoint, save_checkpoint
from glam_ext.config import GLaMConfig

CONFIG = GLaMConfig.preset("tiny")


def model_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.weight": torch.randn(6, 4, generator=generator),
        "layers.0.moe.wi": torch.randn(2, 4, 3, generator=generator).bfloat16(),
        "final_norm.scale": torch.ones(4),
    }


def optimizer_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"embedding.weight.row_var": torch.full((6,), float(seed)), "count": torch.tensor(seed, dtype=torch.int64)}


def save(root: Path, step: int, keep: int = 0, seed: int | None = None, **trainer: Any) -> Path:
    """A checkpoint whose content follows from its step."""
    seed = step if seed is None else seed
    return save_checkpoint(root, step, CONFIG, model_tensors(seed), optimizer_tensors(seed), trainer, keep)


def load_in_python(path: Path, hashes: bool = True) -> tuple[dict[str, Any], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = load_checkpoint(path, hashes)
    content = {
        "path": checkpoint.path,
        "config": checkpoint.config,
        "model": checkpoint.model,
        "optimizer": checkpoint.optimizer,
        "trainer": checkpoint.trainer,
    }
    return content, [str(warning.message) for warning in caught]


def load_in_cpp(path: Path, hashes: bool = True) -> tuple[dict[str, Any], list[str]]:
    facts = _C.open_checkpoint(path, hashes)
    content = {
        "path": Path(facts["path"]),
        "config": GLaMConfig.from_json(facts["config"]),
        "model": _C.load_checkpoint_tensors(facts["path"], "model", hashes),
        "optimizer": _C.load_checkpoint_tensors(facts["path"], "optimizer", hashes),
        "trainer": json.loads(facts["trainer"]),
    }
    return content, facts["warnings"]


Reader = Callable[..., tuple[dict[str, Any], list[str]]]
READERS: dict[str, Reader] = {"python": load_in_python, "cpp": load_in_cpp}


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def flip_bit(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    files = [path for path in sorted(folder.iterdir()) if path.name not in ("manifest.json", "COMPLETE")]
    entries = [{"file": p.name, "size": p.stat().st_size, "sha256": _C.sha256(p.read_bytes())} for p in files]
    manifest = {"format": "glam-checkpoint", "version": 1, "files": entries, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))
