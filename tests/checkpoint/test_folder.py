"""The checkpoint folder as it should be: layout, round trip in both languages, and which folder is found."""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch

from glam_ext import _C
from glam_ext.checkpoint import CheckpointError, find_checkpoint, save_checkpoint, step_folders
from glam_ext.config import GLaMConfig
from tests.checkpoint.helpers import (
    CONFIG,
    assert_same_tensors,
    model_tensors,
    names,
    optimizer_tensors,
    rewrite_manifest,
    save,
)

pytestmark = pytest.mark.filterwarnings("error")


def test_layout(tmp_path):
    folder = save(tmp_path / "checkpoints", 123, tokens=5)
    assert folder == tmp_path / "checkpoints" / "step-000123"
    listed = ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"]
    assert names(folder) == sorted(["COMPLETE", "manifest.json", *listed])
    assert (folder / "COMPLETE").read_bytes() == b""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(entry["file"] for entry in manifest["files"]) == listed
    for entry in manifest["files"]:
        content = (folder / entry["file"]).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == _C.sha256(content)
    assert GLaMConfig.from_json((folder / "config.json").read_text()) == CONFIG


def test_round_trip(tmp_path, read):
    trainer = {"tokens": 2**40, "data": {"row": 7}, "rng": [1, 2**63], "note": "Gr\u00fc\u00dfe", "loss": 0.1}
    save(tmp_path, 3, seed=8, **trainer)
    content, warned = read(tmp_path)
    assert warned == []
    assert content["path"] == tmp_path / "step-000003"
    assert content["config"] == CONFIG
    assert_same_tensors(content["model"], model_tensors(8))
    assert_same_tensors(content["optimizer"], optimizer_tensors(8))
    assert content["trainer"] == {"step": 3, **trainer}


def test_tensors_of_any_layout(tmp_path, read):
    flat = torch.arange(12.0)
    tensors = {
        "transposed": flat.view(3, 4).t(),
        "slice a": flat[:6],
        "slice b": flat[6:],
        "same": flat[:6],
        "parameter": torch.nn.Parameter(flat.view(4, 3)),
    }
    save_checkpoint(tmp_path, 0, CONFIG, tensors, {}, {}, keep=1)
    content, _ = read(tmp_path)
    assert_same_tensors(content["model"], {name: tensor.detach() for name, tensor in tensors.items()})
    assert content["optimizer"] == {}


def test_several_tensor_files_are_joined_and_a_repeated_name_is_refused(tmp_path, read):
    folder = save(tmp_path, 1)
    _C.write_safetensors(folder / "model-00002.safetensors", {"more": torch.ones(2)})
    rewrite_manifest(folder)
    assert_same_tensors(read(tmp_path)[0]["model"], {**model_tensors(1), "more": torch.ones(2)})
    _C.write_safetensors(folder / "model-00003.safetensors", {"final_norm.scale": torch.ones(4)})
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"tensor final_norm.scale: .*model-00003.safetensors overlaps"):
        read(folder)


def test_an_exported_model_needs_no_optimizer_and_any_folder_name(tmp_path, read):
    folder = save(tmp_path, 1).rename(tmp_path / "exported")
    (folder / "optimizer.safetensors").unlink()
    (folder / "trainer.json").unlink()
    rewrite_manifest(folder)
    content, _ = read(folder)
    assert content["optimizer"] == {}
    assert content["trainer"] == {}
    assert_same_tensors(content["model"], model_tensors(1))


@pytest.mark.parametrize(
    "named", ["run", "run/checkpoints", "run/checkpoints/step-000020", "run/checkpoints/step-000020/"]
)
def test_newest_is_found_from_run_root_or_folder(tmp_path, read, named):
    for step in (9, 20, 10):
        save(tmp_path / "run" / "checkpoints", step)
    (tmp_path / "run" / "checkpoints" / "step-000099.bak").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-").mkdir()
    content, warned = read(f"{tmp_path}/{named}")
    assert content["trainer"]["step"] == 20
    assert warned == []


def test_a_million_steps_sort_by_number(tmp_path, read):
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert read(tmp_path)[0]["trainer"]["step"] == 1_000_000


def test_folders_are_readable_by_others(tmp_path):
    """What one user trains another can deploy: the files obey the umask, they are not private."""
    umask = os.umask(0o022)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(umask)
    for path in [folder, *folder.iterdir()]:
        assert path.stat().st_mode & stat.S_IROTH, path


def test_search_helpers(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 12)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-000012", "step-000001"]
    assert find_checkpoint(tmp_path).path.name == "step-000012"
