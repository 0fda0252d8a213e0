"""A checkpoint folder becomes a model through the C++ loader; one that does not fit is refused by the tensor's name."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch

from glam_ext.checkpoint import CheckpointError, save_checkpoint
from glam_ext.config import GLaMConfig
from glam_ext.model import GLaM
from tests.deployment.conftest import CONFIG, Deployed


def save(root: Path, config: GLaMConfig, tensors: dict[str, torch.Tensor]) -> Path:
    return save_checkpoint(root, 1, config, tensors, {}, {}, keep=0)


@pytest.mark.parametrize("changes", [{}, {"tie_embedding": False, "expert_activation": "geglu"}, {"num_experts": 0}])
def test_round_trip(changes: dict[str, object], tmp_path: Path) -> None:
    model = GLaM(dataclasses.replace(CONFIG, **changes), seed=5)  # type: ignore[arg-type]
    loaded = GLaM.from_checkpoint(save(tmp_path, model.config, model.state_dict()))
    assert loaded.config == model.config
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in loaded.parameters())


def test_a_loaded_model_does_not_write_to_the_file(deployed: Deployed) -> None:
    before = (deployed.checkpoint / "model.safetensors").read_bytes()
    loaded = GLaM.from_checkpoint(deployed.checkpoint)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert (deployed.checkpoint / "model.safetensors").read_bytes() == before


def test_the_newest_good_folder_of_a_run(deployed: Deployed, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step, model in ((1, deployed.model), (2, GLaM(CONFIG))):
        save_checkpoint(tmp_path / "checkpoints", step, CONFIG, model.state_dict(), {}, {}, keep=0)
    (tmp_path / "checkpoints/step-000002/COMPLETE").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = GLaM.from_checkpoint(tmp_path)
    assert "step-000002: half-written" in capfd.readouterr().err
    assert torch.equal(loaded.get_parameter("layers.0.moe.wi"), deployed.model.get_parameter("layers.0.moe.wi"))


def test_tensors_that_do_not_fit_are_named(model: GLaM, tmp_path: Path) -> None:
    good = model.state_dict()
    name = "layers.0.moe.wi"
    cases = {
        "missing": ({k: v for k, v in good.items() if k != name}, f"expected a tensor {name}, found none"),
        "unknown": ({**good, "layers.9.moe.wi": good[name]}, "expected no tensor layers.9.moe.wi, which the config"),
        "shape": (
            {**good, name: good[name][:3]},
            rf"expected tensor {name} to be Float \[4, 64, 256\], got Float",
        ),
        "swapped": ({**good, name: good[name].mT}, rf"expected tensor {name} to be .*, got Float \[4, 256, 64\]"),
        "dtype": ({**good, name: good[name].bfloat16()}, rf"expected tensor {name} to be Float .*, got BFloat16"),
    }
    for case, (tensors, message) in cases.items():
        folder = save(tmp_path / case, CONFIG, tensors)
        with pytest.raises(CheckpointError, match=rf"{folder}: {message}.*use another checkpoint or copy"):
            GLaM.from_checkpoint(folder)


def test_a_damaged_tensor_file_is_refused(model: GLaM, tmp_path: Path) -> None:
    file = save(tmp_path, CONFIG, model.state_dict()) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged: its SHA-256 is not the one in"):
        GLaM.from_checkpoint(file.parent)
    assert GLaM.from_checkpoint(file.parent, hashes=False).config == CONFIG  # as asked
