"""glam_ext.GLaM as an ordinary nn.Module over the C++ tensors, and the edits it refuses as C++ would not see them."""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from glam_ext import GLaM, GLaMConfig, Loss, count_parameters, functional, preset_names

from .helpers import assert_same_bits, backward_of, batch_of, build, config_of, gradients_of, loss_and_gradients

CONFIG = config_of(compute_dtype="float32")


@pytest.fixture
def model() -> GLaM:
    return build(CONFIG)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return batch_of(CONFIG)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_adopted(model: GLaM) -> None:
    """Python's parameters are the tensors that C++ computes with, and a change of one changes the other's result."""
    in_cpp = dict(model._core.named_parameters())
    in_python = dict(model.named_parameters())
    assert list(in_cpp) == list(in_python)
    for name, value in in_python.items():
        assert in_cpp[name] is value, name
        assert isinstance(value, nn.Parameter)
        assert value.is_leaf
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(tokens)
        old = in_python["final_norm.scale"].clone()
        in_python["final_norm.scale"].mul_(0.5)
        after = model(tokens)
        in_python["final_norm.scale"].copy_(old)
    assert not torch.equal(before, after)


# --- what keeps the identity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_conversion_keeps_tensors_and_gradients(model: GLaM, batch: dict[str, Tensor], dtype: torch.dtype) -> None:
    backward_of(model.loss(**batch))
    parameters = list(model.parameters())
    assert model.to(dtype) is model
    for before, after in zip(parameters, model.parameters(), strict=True):
        assert before is after
        assert after.dtype == dtype
        assert after.grad is not None
        assert after.grad.dtype == dtype
    assert_adopted(model)
    weights = batch["weights"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    model.zero_grad()
    backward_of(model.loss(**{**batch, "weights": weights}))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_state_dict_round_trip(model: GLaM, batch: dict[str, Tensor]) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build(CONFIG, seed=9)
    assert not torch.equal(other(batch["tokens"]), model(batch["tokens"]))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_adopted(other)
    assert torch.equal(other(batch["tokens"]), model(batch["tokens"]))


def test_state_dict_that_does_not_fit_is_named(model: GLaM) -> None:
    state = model.state_dict()
    del state["layers.0.moe.router"]
    state["layers.1.ffn.w0"] = torch.zeros(3, 5)
    state["layers.7.moe.wi"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert 'Missing key(s) in state_dict: "layers.0.moe.router"' in str(error.value)
    assert 'Unexpected key(s) in state_dict: "layers.7.moe.wi"' in str(error.value)
    assert "size mismatch for layers.1.ffn.w0" in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    ],
    ids=["SGD", "AdamW", "Adafactor"],
)
def test_optimisers_train_the_model(model: GLaM, batch: dict[str, Tensor], make: Callable[..., Any]) -> None:
    """The same steps on the functional form's own tensors, bit for bit; the loss falls."""
    options = functional.options_of(CONFIG)
    mirror = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    optimizers = [make(model.parameters()), make(mirror.values())]
    arguments = (batch["tokens"], batch["targets"], batch["weights"], batch["segment_ids"])
    losses = []
    for _ in range(3):
        loss = model.loss(**batch)
        backward_of(loss)
        losses.append(loss.loss_sum.item())
        backward_of(Loss(*functional.loss(*arguments, mirror, options, True, [0, 0, 0])[:3], *[torch.empty(0)] * 3))
        norms = [nn.utils.clip_grad_norm_(parameters, 1.0) for parameters in (model.parameters(), mirror.values())]
        assert torch.equal(*norms)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert_same_bits(values_of(model), mirror)
    assert losses[2] < losses[0]
    assert_adopted(model)


def test_gradients_are_seen_from_both_sides(model: GLaM, batch: dict[str, Tensor]) -> None:
    backward_of(model.loss(**batch))
    once = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    for name, value in model._core.named_parameters():
        assert value.grad is dict(model.named_parameters())[name].grad
    backward_of(model.loss(**batch))
    for name, value in model.named_parameters():
        assert torch.equal(value.grad, 2 * once[name]), name
    model.zero_grad()
    assert all(value.grad is None for _, value in model._core.named_parameters())


def test_frozen_parameters_get_no_gradient(model: GLaM, batch: dict[str, Tensor]) -> None:
    expected = loss_and_gradients(model, batch)
    model.requires_grad_(False)
    assert not model.loss(**batch).loss_sum.requires_grad
    model.layers[1].requires_grad_(True)
    backward_of(model.loss(**batch))
    for name, value in model.named_parameters():
        assert (value.grad is not None) == name.startswith("layers.1."), name
        if value.grad is not None:
            assert torch.equal(value.grad, expected[name]), name


def test_modes_reach_cpp(batch: dict[str, Tensor]) -> None:
    model = build(config_of(compute_dtype="float32", capacity_factor=0.5))
    kept = {}
    for training in (True, False, True):
        model.train(training)
        statistics = model.loss(**batch).router_statistics
        kept[training] = int(statistics[:, :4].sum())
    real = int((batch["segment_ids"] != 0).sum())
    assert kept[False] == 2 * real
    assert kept[True] < 2 * real
    model.training = True  # as some libraries set it; the parts then disagree
    model.eval()
    model.training = True
    with pytest.raises(RuntimeError, match=r"expected \S+ to be in training mode as the whole model, got evaluation"):
        model(batch["tokens"])


def test_step_is_inference_in_either_mode(batch: dict[str, Tensor]) -> None:
    model = build(config_of(compute_dtype="float32", capacity_factor=0.25, router_jitter=0.5)).eval()
    positions = torch.zeros(3, dtype=torch.int32)
    results = []
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            results.append(model.step(batch["tokens"], model.init_cache(3, 16), positions))
    assert torch.equal(*results)


def test_shared_memory_is_the_models(model: GLaM) -> None:
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert_adopted(model)


# --- copies


class WithHead(GLaM):
    """A user's subclass: an attribute, a module of its own and a reference to a parameter."""

    def __init__(self, config: GLaMConfig) -> None:
        super().__init__(config)
        self.label = ["reward"]
        self.head = nn.Linear(4, 1)
        self.first = self.get_parameter("layers.0.attention.q")


def through_pickle(model: GLaM) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: GLaM) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_whole_and_separate(duplicate: Callable[[GLaM], Any], batch: dict[str, Tensor]) -> None:
    model = WithHead(config_of())
    model.layers[1].requires_grad_(False)
    model.bfloat16().eval()
    loss = model.loss(**batch)
    backward_of(loss)
    other = duplicate(model)
    assert type(other) is WithHead
    assert other.config == model.config
    assert other.label == ["reward"]
    assert other.label is not model.label
    assert not other.training
    assert not other.layers[0].training
    assert other.first is other.get_parameter("layers.0.attention.q")
    assert other.state_dict().keys() == model.state_dict().keys()
    assert_same_bits(other.state_dict(), model.state_dict())
    for name, before in model.named_parameters():
        after = other.get_parameter(name)
        assert before is not after
        assert before.data_ptr() != after.data_ptr()
        assert before.requires_grad == after.requires_grad
        assert (before.grad is None) == (after.grad is None)
        if before.grad is not None:
            assert torch.equal(before.grad, after.grad)
            assert before.grad.data_ptr() != after.grad.data_ptr()
    assert all(other.get_parameter(name) is value for name, value in other._core.named_parameters())
    assert torch.equal(other.loss(**batch).loss_sum, loss.loss_sum)
    before = values_of(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same_bits(values_of(model), before)


def test_deepcopy_keeps_links_within_what_is_copied(batch: dict[str, Tensor]) -> None:
    model = WithHead(CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    assert other.first is other.get_parameter("layers.0.attention.q")
    assert {id(p) for p in other_optimizer.param_groups[0]["params"]} == {id(p) for p in other.parameters()}
    backward_of(other.loss(**batch))
    before, untouched = values_of(other), values_of(model)
    other_optimizer.step()
    assert not torch.equal(before["embedding.weight"], other.get_parameter("embedding.weight"))
    assert_same_bits(values_of(model), untouched)


def test_hooks_of_the_whole_model_run_and_are_copied(model: GLaM, batch: dict[str, Tensor]) -> None:
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(module.get_parameter("embedding.weight").sum()))
    model.register_forward_hook(lambda module, args, out: calls.append(out))
    model.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
    loss = model.loss(**batch)
    assert isinstance(loss, Loss)
    backward_of(loss)
    assert len(calls) == 3
    assert torch.equal(calls[0], model.get_parameter("embedding.weight").sum())
    assert calls[2] == "backward"
    copy.deepcopy(model)(batch["tokens"])
    assert len(calls) == 5


def test_hooks_of_parameters_run_once(model: GLaM, batch: dict[str, Tensor]) -> None:
    expected = loss_and_gradients(model, batch)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    backward_of(model.loss(**batch))
    for name, gradient in gradients_of(model).items():
        assert torch.equal(gradient, 2 * expected[name]), name


def test_compiling_the_module_runs_it_eagerly(model: GLaM, batch: dict[str, Tensor]) -> None:
    expected = loss_and_gradients(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(batch["tokens"], batch["segment_ids"], batch["targets"], batch["weights"])
    backward_of(loss)
    assert_same_bits(gradients_of(model), {name: expected[name] for name, _ in model.named_parameters()})


# --- refusals


def replace_parameter(model: GLaM) -> None:
    model.layers[0].attention.q = nn.Parameter(torch.zeros_like(model.layers[0].attention.q))


def replace_module(model: GLaM) -> None:
    model.layers[1].ffn = nn.Identity()


def replace_subtree(model: GLaM) -> None:
    model.layers[1] = copy.deepcopy(model.layers[0])


def parametrize(model: GLaM) -> None:
    nn.utils.parametrize.register_parametrization(model.layers[0].attention, "q", nn.Identity())


def load_part_with_assign(model: GLaM) -> None:
    model.layers[0].load_state_dict({k: v.clone() for k, v in model.layers[0].state_dict().items()}, assign=True)


def patch_forward(model: GLaM) -> None:
    model.layers[0].ffn_norm.forward = lambda x: x


def remove_module(model: GLaM) -> None:
    del model.layers[1]


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (replace_parameter, "expected layers.0.attention.q to be the tensor that the C\\+\\+ model computes with"),
        (parametrize, "expected layers.0.attention.q to be the tensor that the C\\+\\+ model computes with"),
        (load_part_with_assign, "expected layers.0.attention_norm.scale to be the tensor"),
        (replace_module, "expected layers.1.ffn to be as built, got another module in its place"),
        (replace_subtree, "expected layers.1 to be as built, got another module in its place"),
        (remove_module, "expected layers to be as built, got something added to it or removed"),
        (patch_forward, "expected layers.0.ffn_norm to be as built, got something added to it"),
        (
            lambda m: m.layers[0].register_buffer("mask", torch.ones(1)),
            "expected layers.0 to be as built, got something",
        ),
        (
            lambda m: m.layers[0].attention.add_module("lora", nn.Linear(2, 2)),
            "expected layers.0.attention to be as built, got some",
        ),
        (lambda m: m.layers[0].register_forward_hook(print), "expected layers.0 to be as built, got a hook on it"),
        (lambda m: m.final_norm.register_forward_pre_hook(print), "expected final_norm to be as built, got a hook"),
        (lambda m: m.layers[1].ffn.register_full_backward_hook(print), "expected layers.1.ffn .* got a hook on it"),
        (lambda m: m.layers[1].ffn.register_full_backward_pre_hook(print), "expected layers.1.ffn .* got a hook on it"),
        (lambda m: m.layers[0].eval(), "expected layers.0 to be in training mode as the whole model, got evaluation"),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_edits_that_cpp_cannot_see_are_refused(
    model: GLaM, batch: dict[str, Tensor], edit: Callable[[GLaM], Any], text: str
) -> None:
    model(batch["tokens"])
    edit(model)
    for call in (
        lambda: model(batch["tokens"]),
        lambda: model.loss(**batch),
        lambda: model.step(batch["tokens"], model.init_cache(3, 16), torch.zeros(3, dtype=torch.int32)),
        lambda: copy.deepcopy(model),
        lambda: pickle.dumps(model),
    ):
        with pytest.raises(RuntimeError, match=f"^glam::GLaM: {text}"):
            call()


def test_functional_call_is_refused_and_leaves_the_model_usable(model: GLaM, batch: dict[str, Tensor]) -> None:
    changed = {"layers.0.attention.q": torch.zeros_like(model.layers[0].attention.q)}
    with pytest.raises(RuntimeError, match=r"layers\.0\.attention\.q .* use glam_ext.functional"):
        torch.func.functional_call(model, changed, (batch["tokens"],))
    model(batch["tokens"])


def test_load_with_assign_is_refused(model: GLaM) -> None:
    with pytest.raises(ValueError, match=r"expected assign=False, got True: .*convert the model with .to\(dtype\)"):
        model.load_state_dict(model.state_dict(), assign=True)
    assert_adopted(model)


@pytest.mark.parametrize("convert", [lambda m: m.to("meta"), lambda m: m.to_empty(device="meta")])
def test_conversion_to_meta_is_refused_before_any_change(model: GLaM, convert: Callable[[GLaM], Any]) -> None:
    before = values_of(model)
    with pytest.raises(RuntimeError, match="place of cpu ones, got meta; build the model there"):
        convert(model)
    assert_same_bits(values_of(model), before)
    assert_adopted(model)


@pytest.mark.parametrize("kind", ["overwrite", "swap"])
def test_conversion_by_replacement_is_refused_before_any_change(model: GLaM, kind: str) -> None:
    switch = getattr(torch.__future__, f"set_{kind}_module_params_on_conversion")
    switch(True)
    try:
        with pytest.raises(RuntimeError, match=r"expected parameters to be converted in place"):
            model.double()
    finally:
        switch(False)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert_adopted(model)


def test_a_part_cannot_be_called(model: GLaM) -> None:
    with pytest.raises(RuntimeError, match=r"expected a call of the whole model.*glam_ext\.functional has the parts"):
        model.layers[0](torch.zeros(1, 2, 64))


# --- bad input


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tokens": torch.zeros(3, 16, dtype=torch.int32)}, r"expected tokens to be Long \[B, S\], got Int \[3, 16\]"),
        ({"tokens": torch.zeros(3, 16)}, r"expected tokens to be Long \[B, S\], got Float \[3, 16\]"),
        ({"tokens": torch.zeros(16, dtype=torch.long)}, r"expected tokens to be Long \[B, S\], got Long \[16\]"),
        ({"tokens": torch.full((3, 16), 512)}, r"expected ids in \[0, V\) with V = 512, got 512"),
        ({"tokens": torch.full((3, 16), -1)}, r"expected ids in \[0, V\) with V = 512, got -1"),
        (
            {"targets": torch.zeros(16, 3, dtype=torch.long)},
            r"expected targets to be Long \[3, 16\], got Long \[16, 3\]",
        ),
        ({"targets": torch.zeros(3, 16)}, r"expected targets to be Long \[3, 16\], got Float \[3, 16\]"),
        ({"targets": torch.full((3, 16), 512)}, r"expected targets in \[0, V\) .*512"),
        ({"weights": torch.ones(16, 3)}, r"expected weights to be Float \[3, 16\], got Float \[16, 3\]"),
        ({"weights": torch.ones(3, 16).double()}, r"expected weights to be Float \[3, 16\], got Double \[3, 16\]"),
        ({"segment_ids": torch.ones(3, 16)}, r"expected segment_ids to be Int \[3, 16\], got Float \[3, 16\]"),
        (
            {"segment_ids": torch.ones(48, dtype=torch.int32)},
            r"expected segment_ids to be Int \[3, 16\], got Int \[48\]",
        ),
    ],
)
def test_bad_batches_are_named(model: GLaM, batch: dict[str, Tensor], changes: dict[str, Tensor], text: str) -> None:
    with pytest.raises(RuntimeError, match=rf"^glam::\S+: {text}"):
        model.loss(**{**batch, **changes})


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)])
def test_an_empty_batch_is_named(model: GLaM, shape: tuple[int, int]) -> None:
    with pytest.raises(RuntimeError, match="glam::GLaM: expected at least one token"):
        model(torch.zeros(shape, dtype=torch.long))


def test_a_group_that_does_not_divide_the_batch_is_named(batch: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="expected group_size to divide T = 48, got 7"):
        build(config_of(group_size=7)).loss(**batch)


def test_bad_steps_are_named(model: GLaM, batch: dict[str, Tensor]) -> None:
    tokens, positions = batch["tokens"], torch.zeros(3, dtype=torch.int32)
    cache = model.init_cache(3, 16)
    with pytest.raises(RuntimeError, match=r"expected a cache of 4 tensors \(init_cache makes one\), got 3"):
        model.step(tokens, cache[:3], positions)
    with pytest.raises(RuntimeError, match=r"expected positions to be Int \[3\], got Long \[3\]"):
        model.step(tokens, cache, positions.long())
    with pytest.raises(RuntimeError, match=r"expected lengths to be Int \[3\], got Int \[2\]"):
        model.step(tokens, cache, positions, torch.ones(2, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"glam::relative_attention_step: expected "):
        model.step(tokens, cache, positions + 1)


def test_gradients_of_the_token_losses_are_refused(model: GLaM, batch: dict[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="nll"):
        model.loss(**batch).nll.sum().backward()


# --- the meta device


@pytest.mark.parametrize("name", preset_names())
def test_meta_model_has_the_counted_parameters(name: str) -> None:
    config = GLaMConfig.preset(name)
    started = time.perf_counter()
    model = GLaM(config, device="meta")
    assert time.perf_counter() - started < 10
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).total
