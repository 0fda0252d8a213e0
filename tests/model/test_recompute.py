"""Activation recomputation: less is kept, and not a bit of the loss or of a gradient changes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glam_ext import GLaM

from .helpers import (
    COUNTERS,
    VARIANTS,
    assert_same_bits,
    backward_of,
    batch_of,
    build,
    config_of,
    gradients_of,
    loss_and_gradients,
)


def pair(variant: str = "default", dtype: torch.dtype = torch.float32, **fields: Any) -> tuple[GLaM, GLaM]:
    """The same model, without and with recomputation."""
    fields = {"compute_dtype": "float32", **fields}
    return build(config_of(variant, **fields), dtype), build(config_of(variant, recompute=True, **fields), dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_the_same_bits(variant: str, compute_dtype: str) -> None:
    plain, saving = pair(variant, compute_dtype=compute_dtype)
    batch = batch_of(plain.config)
    expected = loss_and_gradients(plain, batch, **COUNTERS)
    assert_same_bits(loss_and_gradients(saving, batch, **COUNTERS), expected)


def saved_bytes(model: GLaM, batch: dict[str, Tensor]) -> int:
    """Bytes of distinct storages that the graph of one loss keeps, parameters not counted."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    inputs = {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters | inputs:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(**batch)
    return sum(size for size, _ in kept.values())


def test_a_layer_keeps_its_input_only() -> None:
    kept = {}
    for layers in (2, 6):
        models = pair(num_layers=layers)
        batch = batch_of(models[0].config, rows=4, size=32)
        kept[layers] = [saved_bytes(model, batch) for model in models]
    stream = 4 * 32 * 64 * 4  # [B, S, D] in float32
    plain, saving = ((many - few) / 4 for few, many in zip(kept[2], kept[6], strict=True))
    assert stream <= saving <= 1.1 * stream, saving / stream
    assert plain > 8 * stream


def test_gradients_of_some_parameters() -> None:
    plain, saving = pair()
    batch = batch_of(plain.config)
    expected = loss_and_gradients(plain, batch)
    names = ["layers.0.moe.router", "layers.1.attention.o"]
    found = torch.autograd.grad(saving.loss(**batch).loss_sum, [saving.get_parameter(name) for name in names])
    alone = torch.autograd.grad(plain.loss(**batch).loss_sum, [plain.get_parameter(name) for name in names])
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    for frozen in ("layers.0", "layers.1.attention", "embedding"):
        saving.requires_grad_(True).get_submodule(frozen).requires_grad_(False)
        backward_of(saving.loss(**batch))
        for name, parameter in saving.named_parameters():
            assert (parameter.grad is None) == name.startswith(frozen + "."), name
            assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name
        saving.zero_grad()


@pytest.mark.parametrize("which", ["aux", "router_z"])
def test_gradients_of_one_output(which: str) -> None:
    plain, saving = pair("gelu in the odd layers, random")
    batch = batch_of(plain.config)
    for model in (plain, saving):
        getattr(model.loss(**batch, **COUNTERS), which).backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (a.grad is None) or torch.equal(a.grad, b.grad), name
    assert plain.get_parameter("layers.1.moe.router").grad is not None


def test_hooks_of_parameters_run_once() -> None:
    plain, saving = pair()
    batch = batch_of(plain.config)
    expected = loss_and_gradients(plain, batch)
    for parameter in saving.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    backward_of(saving.loss(**batch))
    for name, gradient in gradients_of(saving).items():
        assert torch.equal(gradient, 2 * expected[name]), name


def test_gradients_accumulate() -> None:
    plain, saving = pair()
    for seed in (1, 2):
        for model in (plain, saving):
            backward_of(model.loss(**batch_of(model.config, seed=seed)))
    assert_same_bits(gradients_of(saving), gradients_of(plain))


def test_the_mode_of_the_forward_counts() -> None:
    plain, saving = pair(capacity_factor=0.5)
    batch = batch_of(plain.config)
    expected = loss_and_gradients(plain, batch)
    loss = saving.loss(**batch)
    saving.eval()
    saving(batch["tokens"])  # an evaluation between forward and backward
    backward_of(loss)
    assert_same_bits(gradients_of(saving), {name: expected[name] for name, _ in saving.named_parameters()})


def test_autocast_of_the_forward_counts() -> None:
    plain, saving = pair()
    batch = batch_of(plain.config)
    results = []
    for model in (plain, saving):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(**batch)
        backward_of(loss)
        results.append(gradients_of(model))
    assert_same_bits(*results)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()
    backward_of(plain.loss(**batch))
    assert not torch.equal(gradients_of(plain)["layers.0.attention.q"], results[0]["layers.0.attention.q"])


def test_a_parameter_changed_before_the_backward_is_an_error() -> None:
    _, saving = pair()
    loss = saving.loss(**batch_of(saving.config))
    with torch.no_grad():
        saving.get_parameter("layers.0.attention.q").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        backward_of(loss)


@pytest.mark.parametrize(
    ("again", "text"),
    [
        (lambda loss: backward_of(loss), "backward through the graph a second time"),
        (lambda loss: loss.loss_sum.backward(create_graph=True), "double backward is not supported"),
    ],
    ids=["second backward", "double backward"],
)
def test_second_passes_are_refused(again: Callable[[Any], None], text: str) -> None:
    _, saving = pair()
    loss = saving.loss(**batch_of(saving.config))
    if "second" in text:
        backward_of(loss)
    with pytest.raises(RuntimeError, match=text):
        again(loss)


def test_a_graph_may_be_kept() -> None:
    _, saving = pair()
    loss = saving.loss(**batch_of(saving.config))
    for _ in range(2):
        loss.loss_sum.backward(retain_graph=True)
    twice = gradients_of(saving)
    loss.loss_sum.backward()
    for name, gradient in gradients_of(saving).items():
        assert torch.equal(twice[name], 2 * gradient), name


def test_the_graph_outlives_the_model_and_frees_it() -> None:
    plain, saving = pair()
    batch = batch_of(plain.config)
    expected = loss_and_gradients(plain, batch)
    embedding = saving.get_parameter("embedding.weight")
    loss = saving.loss(**batch)
    del saving
    gc.collect()
    backward_of(loss)
    assert torch.equal(embedding.grad, expected["embedding.weight"])


def test_inference_and_evaluation_do_not_recompute() -> None:
    _, saving = pair()
    batch = batch_of(saving.config)
    with torch.no_grad():
        assert not saving.loss(**batch).loss_sum.requires_grad
    in_training = saved_bytes(saving, batch)
    assert saved_bytes(saving.eval(), batch) > 2 * in_training
