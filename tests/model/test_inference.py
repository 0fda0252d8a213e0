"""A model prepared for inference: packed weights in every way that a model is used."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glam_ext import GLaM, functional
from glam_ext.checkpoint import CheckpointError, save_checkpoint
from glam_ext.export import export_torchscript, load_archive
from glam_ext.generate import generate
from tests.ops.levels import assert_close, assert_same_bits

from .helpers import VARIANTS, batch_of, build, config_of

FORMS = ["bfloat16", "int8"]


def plain_and_prepared(variant: str, form: str, **fields: str) -> tuple[GLaM, GLaM]:
    model = build(config_of(variant, **{"compute_dtype": "bfloat16", **fields})).eval()
    return model, copy.deepcopy(model).prepare_for_inference(form)


def save(root: Path, model: GLaM) -> Path:
    return save_checkpoint(root, 1, model.config, model.state_dict(), {}, {}, keep=0)


def outputs(model: GLaM) -> list[Tensor]:
    """Logits, loss, and a prefill with two steps behind it."""
    batch = batch_of(model.config)
    tokens = batch["tokens"]
    rows = len(tokens)
    with torch.no_grad():
        found = [model(tokens, batch["segment_ids"]), *model.loss(**batch)]
        cache = model.init_cache(rows, 8)
        found.append(model.step(tokens[:, :6], cache, torch.zeros(rows, dtype=torch.int32)))
        found += [model.step(tokens[:, i : i + 1], cache, torch.full((rows,), i, dtype=torch.int32)) for i in (6, 7)]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_has_the_bits_of_the_model(variant: str) -> None:
    """In bfloat16 compute every weight that is packed enters its product rounded anyway."""
    plain, prepared = plain_and_prepared(variant, "bfloat16")
    assert_same_bits(outputs(prepared), outputs(plain), variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_int8_is_the_model_of_the_weights_that_it_holds(variant: str) -> None:
    """In float32: in bfloat16 a token near a tie could go to another expert."""
    _, prepared = plain_and_prepared(variant, "int8", compute_dtype="float32")
    held = build(config_of(variant)).eval()
    with torch.no_grad():
        for name, parameter in held.named_parameters():
            value = prepared.get_parameter(name)
            if value.dtype == torch.int8:
                value = torch.ops.glam.unpack_weight(value)
            parameter.copy_(value.t() if name in ("embedding.weight", "output.weight") else value)
    held.double()
    batch = batch_of(held.config, dtype=torch.float64)
    with torch.no_grad():
        want = held(batch["tokens"], batch["segment_ids"])
        got = prepared(batch["tokens"], batch["segment_ids"])
    assert_close(got, want, 1e-4, variant)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_functional_and_archive_agree(variant: str, form: str, tmp_path: Path) -> None:
    _, model = plain_and_prepared(variant, form)
    batch = batch_of(model.config)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    options = functional.options_of(model.config)
    archive = load_archive(export_torchscript(model, tmp_path / "model.pt"))
    with torch.no_grad():
        want = model(tokens, segment_ids)
        parameters = dict(model.named_parameters())
        assert_same_bits(
            [functional.forward(tokens, segment_ids, parameters, options, False, [0, 0, 0])], [want], "functional"
        )
        assert_same_bits([archive.module(tokens, segment_ids)], [want], "archive")
        (expected,) = generate(model, [[5, 6, 7]], 6, temperature=0.0, stop_tokens=[])
        lengths = torch.tensor([3], dtype=torch.int32)
        new, _ = archive.module.generate(torch.tensor([[5, 6, 7]]), lengths, 6, 0.0, 0, 1.0, 0, [])
        assert new[0].tolist() == expected
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / "model.pt").stat().st_size < weights + 400_000  # nothing plain is left


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_loads_straight_into_it(form: str, tmp_path: Path) -> None:
    plain, prepared = plain_and_prepared("geglu, untied, caps", form)
    folder = save(tmp_path, plain)
    loaded = GLaM.from_checkpoint(folder, inference=form)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    names = [name for name, _ in prepared.named_parameters()]
    assert [name for name, _ in loaded.named_parameters()] == names
    assert_same_bits(list(loaded.parameters()), list(prepared.parameters()), "parameters")


LOADING = """
import sys, threading, time, torch
from glam_ext import GLaM

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10

small, folder, form = sys.argv[1:]
GLaM.from_checkpoint(small, inference=form)
torch.set_num_threads(1)
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
model = GLaM.from_checkpoint(folder, inference=form)
done = True
watcher.join()
print(peak - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.parametrize("form", FORMS)
def test_loading_never_holds_the_float32_model(form: str, tmp_path: Path) -> None:
    big = config_of(num_layers=4, model_dim=256, hidden_dim=2048, num_experts=8)
    folders = []
    for name, config in (("small", config_of()), ("big", big)):
        folders.append(str(save(tmp_path / name, GLaM(config))))
    command = [sys.executable, "-c", LOADING, *folders, form]
    held, packed = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert packed > 20e6  # a large model beside the allowance
    assert held < packed + 12e6, f"{held / 1e6:.0f} MB for {packed / 1e6:.0f} MB of packed weights"


@pytest.mark.parametrize("form", FORMS)
def test_copies_and_pickles(form: str) -> None:
    _, model = plain_and_prepared("default", form)
    want = outputs(model)
    assert_same_bits(outputs(copy.deepcopy(model)), want, "copy")
    assert_same_bits(outputs(pickle.loads(pickle.dumps(model))), want, "pickle")
    fresh = build(model.config).prepare_for_inference(form)
    fresh.load_state_dict(model.state_dict())
    assert_same_bits(outputs(fresh), want, "state_dict")
    assert list(model.expert_parameters()) == ["layers.0.moe.wi", "layers.0.moe.wo"]


def test_an_odd_vocabulary_keeps_its_table() -> None:
    _, model = plain_and_prepared("default", "int8", vocab_size=515)  # type: ignore[arg-type]
    assert model.get_parameter("embedding.weight").dtype == torch.bfloat16
    assert model.get_parameter("embedding.weight").shape == (515, model.config.model_dim)
    assert all(x.isfinite().all() for x in outputs(model) if x.is_floating_point())


def test_what_cannot_be_prepared_is_refused_unchanged() -> None:
    narrow = build(config_of(hidden_dim=80))
    for model, form, text in (
        (narrow, "int8", "hidden_dim to be a multiple of 32, got 80"),
        (build(config_of()).double(), "int8", "Float or BFloat16 parameters"),
        (plain_and_prepared("default", "int8")[1], "int8", "prepared already"),
    ):
        before = {name: (value.dtype, value.shape) for name, value in model.state_dict().items()}
        with pytest.raises((RuntimeError, ValueError), match=f"glam::GLaM.prepare_for_inference: expected .*{text}"):
            model.prepare_for_inference(form)
        assert {name: (value.dtype, value.shape) for name, value in model.state_dict().items()} == before
    with pytest.raises(ValueError, match='expected "bfloat16" or "int8", got \'int4\''):
        narrow.prepare_for_inference("int4")


def test_a_prepared_model_is_neither_trained_nor_converted_nor_a_checkpoint(tmp_path: Path) -> None:
    _, model = plain_and_prepared("default", "bfloat16")
    assert not model.loss(**batch_of(model.config)).loss_sum.requires_grad
    with pytest.raises(RuntimeError, match="expected a prepared model to keep its dtypes"):
        model.float()
    with pytest.raises(CheckpointError, match=r"expected tensor embedding\.weight to be Float"):
        GLaM.from_checkpoint(save(tmp_path, model))
