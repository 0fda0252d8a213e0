"""glam_ext.functional: the bits of the C++ model, and what it is for: compilers, exports and edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from glam_ext import _C, GLaM, GLaMConfig, functional

from .helpers import COUNTERS, VARIANTS, assert_same_bits, batch_of, build, config_of, loss_and_gradients

DTYPES = {
    "float32": ({"compute_dtype": "float32"}, torch.float32),
    "bfloat16": ({"compute_dtype": "bfloat16"}, torch.float32),
    "bfloat16 parameters": ({"compute_dtype": "bfloat16"}, torch.bfloat16),
    "float64": ({"compute_dtype": "float32"}, torch.float64),
}
RANDOM = list(COUNTERS.values())


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def leaves(model: GLaM) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}


def functional_results(
    parameters: dict[str, Tensor], batch: dict[str, Tensor], config: GLaMConfig, call: Any = functional.loss
) -> dict[str, Tensor]:
    """The functional form's outputs and gradients, named as `loss_and_gradients` names them."""
    arguments = (batch["tokens"], batch["targets"], batch["weights"], batch["segment_ids"])
    out = call(*arguments, parameters, functional.options_of(config), True, RANDOM)
    total = out[0] + 0.3 * out[1] + 0.01 * out[2]
    gradients = torch.autograd.grad(total, list(parameters.values()))
    named = dict(zip(("loss_sum", "aux", "router_z", "nll", "router_statistics"), out, strict=True))
    return {**named, **dict(zip(parameters, gradients, strict=True))}


def model_results(model: GLaM, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    results = loss_and_gradients(model, batch, **COUNTERS)
    assert int(results.pop("num_tokens")) == int((batch["segment_ids"] != 0).sum())
    return results


@pytest.fixture(params=DTYPES)
def precision(request: pytest.FixtureRequest) -> tuple[dict[str, str], torch.dtype]:
    return DTYPES[request.param]


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_have_the_models_bits(variant: str, precision: tuple[dict[str, str], torch.dtype]) -> None:
    fields, dtype = precision
    config = config_of(variant, **fields)
    model = build(config, dtype)
    batch = batch_of(config, dtype=weights_dtype(dtype))
    expected = model_results(model, batch)
    if config.num_moe_layers:
        assert expected["router_statistics"][:, config.num_experts : config.num_experts + 2].sum() > 0, (
            "nothing dropped"
        )
    assert_same_bits(functional_results(leaves(model), batch, config), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_has_the_models_bits(variant: str, precision: tuple[dict[str, str], torch.dtype]) -> None:
    fields, dtype = precision
    config = config_of(variant, **fields)
    model = build(config, dtype).eval()
    parameters, options = dict(model.named_parameters()), functional.options_of(config)
    batch = batch_of(config)
    tokens, segment_ids = batch["tokens"], batch["segment_ids"]
    lengths = torch.tensor([5, 16, 9], dtype=torch.int32)
    with torch.no_grad():
        for segments in (None, segment_ids):
            expected = model(tokens, segments)
            assert_same_bits(
                {"": functional.forward(tokens, segments, parameters, options, False, [0, 0, 0])}, {"": expected}
            )
            assert expected.dtype == weights_dtype(dtype)
        cache, other = model.init_cache(3, 24), functional.init_cache(3, 24, parameters, options)
        positions = torch.zeros(3, dtype=torch.int32)
        expected = model.step(tokens, cache, positions, lengths)
        actual, other = functional.step(tokens, other, positions, lengths, parameters, options)
        assert_same_bits({"": actual}, {"": expected})
        expected = model.step(tokens[:, :2], cache, lengths)
        two = torch.full_like(lengths, 2)
        actual, other = functional.step(tokens[:, :2], other, lengths, two, parameters, options)
        assert_same_bits({"": actual}, {"": expected})
        assert_same_bits(dict(enumerate(other)), dict(enumerate(cache)))
    sampling = (8, 0.8, 20, 0.9, 7, [1])
    expected_tokens, expected_counts = _C.generate(model._core, tokens, lengths, *sampling, None)
    actual_tokens, actual_counts = functional.generate(tokens, lengths, *sampling, parameters, options)
    assert torch.equal(actual_tokens, expected_tokens)
    assert torch.equal(actual_counts, expected_counts)


@pytest.mark.parametrize(
    ("variant", "dynamic"), [*((name, False) for name in VARIANTS), ("gelu in the odd layers, random", True)]
)
def test_loss_compiles_as_one_graph(variant: str, dynamic: bool) -> None:
    config = config_of(variant, compute_dtype="float32")
    parameters = leaves(build(config))
    torch._dynamo.reset()
    compiled = torch.compile(functional.loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    shapes = [(3, 16), (5, 24), (4, 8)] if dynamic else [(3, 16)]
    for index, (rows, size) in enumerate(shapes):
        batch = batch_of(config, rows, size)
        # One graph serves every shape.
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            actual = functional_results(parameters, batch, config, compiled)
        assert_same_bits(actual, functional_results(parameters, batch, config))


def test_forward_runs_through_inductor() -> None:
    config = config_of(compute_dtype="float32", num_layers=1)
    model = build(config).eval()
    parameters, tokens = dict(model.named_parameters()), batch_of(config)["tokens"]
    arguments = (tokens, None, parameters, functional.options_of(config), False, [0, 0, 0])
    torch._dynamo.reset()
    compiled = torch.compile(functional.forward, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*arguments), functional.forward(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_archive_has_the_models_bits(variant: str, tmp_path: Path) -> None:
    """The same text compiled as TorchScript."""
    model = build(config_of(variant))
    _C.export_torchscript(model._core, tmp_path / "glam.pt", {})
    archive = torch.jit.load(tmp_path / "glam.pt")
    batch = batch_of(model.eval().config)
    tokens, lengths = batch["tokens"], torch.tensor([5, 16, 9], dtype=torch.int32)
    positions = torch.zeros(3, dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(archive(tokens, batch["segment_ids"]), model(tokens, batch["segment_ids"]))
        logits, cache = archive.step(tokens, archive.init_cache(3, 16), positions, lengths)
        expected_cache = model.init_cache(3, 16)
        assert torch.equal(logits, model.step(tokens, expected_cache, positions, lengths))
        assert_same_bits(dict(enumerate(cache)), dict(enumerate(expected_cache)))
    sampling = (8, 0.8, 20, 0.9, 7, [1])
    expected = _C.generate(model._core, tokens, lengths, *sampling, None)
    assert all(torch.equal(a, b) for a, b in zip(archive.generate(tokens, lengths, *sampling), expected, strict=True))


@pytest.mark.parametrize("name", ["targets", "weights"])
def test_a_transposed_argument_is_named(name: str) -> None:
    config = config_of()
    batch = batch_of(config)
    batch[name] = batch[name].T
    with pytest.raises(AssertionError, match=rf"expected {name} to be \[B, S\] as tokens, \[3, 16\], got \[16, 3\]"):
        functional_results(leaves(build(config)), batch, config)


def test_tokens_of_another_rank_are_named(tmp_path: Path) -> None:
    """By the text as Python and by the same text as TorchScript."""
    model = build(config_of()).eval()
    parameters, options = dict(model.named_parameters()), functional.options_of(model.config)
    _C.export_torchscript(model._core, tmp_path / "glam.pt", {})
    archive = torch.jit.load(tmp_path / "glam.pt")
    tokens, one = torch.tensor([2, 3, 4]), torch.ones(1, dtype=torch.int32)
    cache = model.init_cache(1, 8)
    sampling = (4, 0.0, 0, 1.0, 0, [])
    calls = {
        r"glam::GLaM: expected tokens to be \[B, S\], got \[3\]": [
            lambda: functional.forward(tokens, None, parameters, options, False, [0, 0, 0]),
            lambda: archive(tokens, None),
        ],
        r"glam::GLaM.step: expected tokens to be \[B, N\], got \[3\]": [
            lambda: functional.step(tokens, cache, one, one, parameters, options),
            lambda: archive.step(tokens, cache, one, one),
        ],
        r"glam::generate: expected tokens to be \[B, N\], got \[3\]": [
            lambda: functional.generate(tokens, one, *sampling, parameters, options),
            lambda: archive.generate(tokens, one, *sampling),
        ],
        r"glam::generate: expected lengths in \[1, N\] with N = 3, got 4 to 4": [
            lambda: functional.generate(tokens[None], 4 * one, *sampling, parameters, options),
            lambda: archive.generate(tokens[None], 4 * one, *sampling),
        ],
    }
    for text, (plain, scripted) in calls.items():
        with pytest.raises(AssertionError, match=text):
            plain()
        with pytest.raises(torch.jit.Error, match=text):
            scripted()


class Exported(torch.nn.Module):
    """How a user exports: a module that holds the parameters and calls the functional form."""

    def __init__(self, model: GLaM) -> None:
        super().__init__()
        self.names = [name for name, _ in model.named_parameters()]
        self.values = torch.nn.ParameterList([value.detach().clone() for value in model.parameters()])
        self.options = functional.options_of(model.config)

    def forward(self, tokens: Tensor) -> Tensor:
        parameters = dict(zip(self.names, self.values, strict=True))
        return functional.forward(tokens, None, parameters, self.options, False, [0, 0, 0])


def test_forward_exports_with_free_sizes() -> None:
    config = config_of("geglu, untied, caps")
    model = build(config).eval()
    sizes = {0: torch.export.Dim("rows", min=2, max=64), 1: torch.export.Dim("size", min=2, max=256)}
    tokens = batch_of(config)["tokens"]
    program = torch.export.export(Exported(model), (tokens,), dynamic_shapes=({**sizes},))
    for rows, size in ((3, 16), (5, 33)):
        tokens = batch_of(config, rows, size)["tokens"]
        with torch.no_grad():
            assert_same_bits({"": program.module()(tokens)}, {"": model(tokens)})


def test_low_rank_adapters_train_and_equal_the_edited_model() -> None:
    config = config_of(compute_dtype="float32")
    model, batch = build(config), batch_of(config)
    frozen = {name: value.detach() for name, value in model.named_parameters()}
    name = "layers.1.attention.q"
    generator = torch.Generator().manual_seed(0)
    down = (0.1 * torch.randn(config.model_dim, 2, generator=generator)).requires_grad_()
    up = (0.1 * torch.randn(2, frozen[name].size(1), generator=generator)).requires_grad_()
    edited = {**frozen, name: frozen[name] + down @ up}
    arguments = (batch["tokens"], batch["targets"], batch["weights"], batch["segment_ids"])
    loss_sum = functional.loss(*arguments, edited, functional.options_of(config), True, [0, 0, 0])[0]
    loss_sum.backward()
    with torch.no_grad():
        dict(model.named_parameters())[name].copy_(edited[name])
    loss = model.loss(**batch)
    loss.loss_sum.backward()
    assert torch.equal(loss_sum, loss.loss_sum)
    gradient = dict(model.named_parameters())[name].grad
    assert gradient is not None
    torch.testing.assert_close(down.grad, gradient @ up.detach().T)
    torch.testing.assert_close(up.grad, down.detach().T @ gradient)


def test_a_hook_between_layers_sees_the_residual_stream() -> None:
    # The wiring is plain Python: a research edit calls the parts itself.
    config = config_of(compute_dtype="float32")
    model, options = build(config), functional.options_of(config)
    parameters, batch = dict(model.named_parameters()), batch_of(config)
    seen = []
    x = functional.embed(batch["tokens"], parameters, options)
    x = functional.attention_layer(x, batch["segment_ids"], "layers.0.", parameters, options)
    x.register_hook(lambda gradient: seen.append(gradient.shape))
    mask = batch["segment_ids"].flatten() != 0
    x, *_ = functional.moe_layer(x, mask, 0, "layers.0.", parameters, options, True, [0, 0, 0])
    x = functional.attention_layer(x, batch["segment_ids"], "layers.1.", parameters, options)
    x = functional.dense_layer(x, "layers.1.", parameters, options)
    h = torch.ops.glam.rms_norm(x, parameters["final_norm.scale"], options.norm_eps)
    logits = functional.output_logits(h, parameters, options)
    assert torch.equal(logits, model(batch["tokens"], batch["segment_ids"]))
    logits.sum().backward()
    assert seen == [x.shape]
