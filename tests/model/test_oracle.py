"""The model against the einsum oracle in float64: logits, losses and the gradient of every parameter.

Every batch has padding, two segments in a row, dropped first and second choices and an expert without a row.
Random numbers of the routing policies and of the jitter are inputs of the oracle, made by the library's generator.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import glam_ext
from glam_ext import GLaMConfig, functional
from tests.reference import glam as oracle

BASE = GLaMConfig(
    vocab_size=37,
    num_layers=4,
    model_dim=12,
    hidden_dim=20,
    num_heads=3,
    head_dim=5,
    num_experts=6,
    capacity_factor=1.0,
)
CASES = {
    "default": {},
    "experts in the odd layers, gelu": {"moe_first": False, "expert_activation": "gelu"},
    "geglu experts, untied": {"expert_activation": "geglu", "tie_embedding": False},
    "caps and smoothing": {
        "attention_logit_cap": 2.0,
        "logit_cap": 3.0,
        "router_logit_cap": 4.0,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
    },
    "no extra logit, one group, mean": {
        "attention_extra_logit": False,
        "group_size": -1,
        "aux_loss_reduction": "mean",
        "norm_eps": 0.01,
    },
    "normalised after capacity, groups of 8": {"normalize_before_capacity": False, "group_size": 8},
    "random second choice": {"second_policy": "random", "second_threshold": 0.6},
    "sampled second choice": {"second_policy": "sampling"},
    "jitter": {"router_jitter": 0.2},
}
DENSE = {"dense": {"num_experts": 0}, "one expert": {"num_experts": 1, "tie_embedding": False, "logit_cap": 3.0}}
COUNTERS = [5, 3, 48]  # seed, step, first token
BATCH, SIZE = 2, 24


def config_of(case: str) -> GLaMConfig:
    return dataclasses.replace(BASE, **{**CASES, **DENSE}[case])


def parameters_of(config: GLaMConfig) -> dict[str, Tensor]:
    """Random parameters; all tokens share a direction that expert 2 of every layer avoids, so it stays empty."""
    parameters = oracle.random_parameters(config, seed=11)
    common_D = torch.randn(config.model_dim, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters["embedding.weight"] += 2 * common_D
    for name, value in parameters.items():
        if name.endswith("router"):
            value[:, 2] -= 3 * common_D
    return {name: value.requires_grad_() for name, value in parameters.items()}


def batch_of(config: GLaMConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(config.vocab_size, (BATCH, SIZE), generator=generator)
    segment_ids = torch.tensor([[1] * 9 + [2] * 12 + [0] * 3, [3] * 20 + [0] * 4], dtype=torch.int32)
    weights = (segment_ids != 0) * (0.5 + torch.rand(BATCH, SIZE, generator=generator, dtype=torch.float64))
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "weights": weights, "segment_ids": segment_ids}


def random_inputs(config: GLaMConfig) -> tuple[dict[int, Tensor] | None, dict[int, Tensor] | None]:
    """Each MoE layer's noise and jitter factors, by the library's counter-based generator."""
    options = functional.options_of(config)
    z_TE = torch.zeros(BATCH * SIZE, config.num_experts)
    h_TD = torch.zeros(BATCH * SIZE, config.model_dim)
    noise, jitter = {}, {}
    for layer in range(config.num_layers):
        uniform = functional.routing_noise(z_TE, layer, options, True, COUNTERS)
        if uniform is not None:
            noise[layer] = uniform
        if config.router_jitter > 0:
            index = torch.arange(h_TD.numel()).view(h_TD.shape) + COUNTERS[2] * config.model_dim
            stream = (COUNTERS[1] * config.num_layers + layer) * 2 + 1
            factors = torch.ops.glam.counter_uniform(COUNTERS[0], stream, index)
            jitter[layer] = 1 + config.router_jitter * (2 * factors - 1)
    return noise or None, jitter or None


def oracle_output(config: GLaMConfig, parameters: dict[str, Tensor], training: bool = True) -> oracle.Output:
    noise, jitter = random_inputs(config) if training else (None, None)
    if not training:
        config = dataclasses.replace(config, second_policy="all", second_threshold=0.0)
    return oracle.forward(parameters, config, **batch_of(config), training=training, noise=noise, jitter=jitter)


def total_of(loss_sum: Tensor, aux: Tensor, router_z: Tensor) -> Tensor:
    return loss_sum + 0.3 * aux + 0.01 * router_z


def expected_gradients(config: GLaMConfig, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    output = oracle_output(config, parameters)
    assert output.loss_sum is not None
    total = total_of(output.loss_sum, output.aux, output.router_z)
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def assert_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.norm() > 0, name
        assert (actual[name] - wanted).norm() <= 1e-10 * wanted.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_the_batch_exercises_every_kind_of_token(case: str) -> None:
    config = config_of(case)
    output = oracle_output(config, parameters_of(config))
    assert output.dropped_first > 0
    assert output.dropped_second > 0
    assert output.empty_experts > 0
    assert (batch_of(config)["segment_ids"] == 0).any()


@pytest.mark.parametrize("case", CASES)
def test_functional_form_equals_the_oracle(case: str) -> None:
    config = config_of(case)
    parameters, batch, options = parameters_of(config), batch_of(config), functional.options_of(config)
    expected = oracle_output(config, parameters)
    assert expected.loss_sum is not None
    assert expected.nll is not None
    loss_sum, aux, router_z, nll, statistics = functional.loss(
        batch["tokens"], batch["targets"], batch["weights"], batch["segment_ids"], parameters, options, True, COUNTERS
    )
    real = batch["segment_ids"] != 0
    torch.testing.assert_close(loss_sum, expected.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(aux, expected.aux, rtol=1e-12, atol=0)
    torch.testing.assert_close(router_z, expected.router_z, rtol=1e-12, atol=0)
    torch.testing.assert_close(nll[real], expected.nll[real], rtol=1e-11, atol=0)
    # Rows of each expert, then first and second choices over capacity.
    rows_of_expert = torch.stack([(c != 0).sum((0, 1, 3)) for c in expected.combine_of_layer])
    assert torch.equal(statistics[:, : config.num_experts], rows_of_expert)
    assert int(statistics[:, config.num_experts].sum()) == expected.dropped_first
    assert int(statistics[:, config.num_experts + 1].sum()) == expected.dropped_second

    gradients = torch.autograd.grad(total_of(loss_sum, aux, router_z), list(parameters.values()))
    assert_gradients(dict(zip(parameters, gradients, strict=True)), expected_gradients(config, parameters))


@pytest.mark.parametrize("case", [*CASES, *DENSE])
def test_model_equals_the_oracle(case: str) -> None:
    config = config_of(case)
    parameters, batch = parameters_of(config), batch_of(config)
    model = glam_ext.GLaM(config).double()
    model.load_state_dict(parameters)
    loss = model.loss(**batch, seed=COUNTERS[0], step=COUNTERS[1], first_token=COUNTERS[2])
    expected = oracle_output(config, parameters)
    assert expected.loss_sum is not None
    torch.testing.assert_close(loss.loss_sum, expected.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.aux, expected.aux, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.router_z, expected.router_z, rtol=1e-12, atol=0)
    assert int(loss.num_tokens) == int((batch["segment_ids"] != 0).sum())
    assert loss.router_statistics.shape == (config.num_moe_layers, config.num_experts + 6)
    total_of(loss.loss_sum, loss.aux, loss.router_z).backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradients({name: actual[name] for name in parameters}, expected_gradients(config, parameters))
    assert actual.keys() == parameters.keys()


@pytest.mark.parametrize(
    ("case", "factor"), [*((case, None) for case in [*CASES, *DENSE]), *((case, 1.0) for case in CASES)]
)
def test_logits_in_evaluation_equal_the_oracle(case: str, factor: float | None) -> None:
    config = dataclasses.replace(config_of(case), eval_capacity_factor=factor)
    parameters, batch = parameters_of(config), batch_of(config)
    expected = oracle_output(config, parameters, training=False)
    assert (expected.dropped_first > 0) == (factor is not None)
    real = batch["segment_ids"] != 0
    model = glam_ext.GLaM(config).double().eval()
    model.load_state_dict(parameters)
    options = functional.options_of(config)
    with torch.no_grad():
        for logits in (
            model(batch["tokens"], batch["segment_ids"]),
            functional.forward(batch["tokens"], batch["segment_ids"], parameters, options, False, [0, 0, 0]),
        ):
            torch.testing.assert_close(logits[real], expected.logits[real], rtol=1e-11, atol=1e-12)


def parameters_with_margins(config: GLaMConfig) -> dict[str, Tensor]:
    """Parameters in bfloat16's numbers whose router decides by wide margins, so that rounding moves no token.

    A token's embedding names its two experts; the branches add little to it.
    """
    parameters = oracle.random_parameters(config, seed=11)
    for name, value in parameters.items():
        if name == "embedding.weight":
            value *= 0.2
            for v in range(config.vocab_size):
                first = v % config.num_experts
                value[v, first] += 4
                value[v, (first + 1 + v // config.num_experts % 3) % config.num_experts] += 2
        elif name.endswith(("moe.wo", "ffn.wo", "attention.o")):
            value *= 0.1
        elif name.endswith("router"):
            value.copy_(torch.eye(*value.shape, dtype=torch.float64) * 1.5)
    return {name: value.bfloat16().double() for name, value in parameters.items()}


# Of the loss and of each gradient's norm: some roundings of float32, or of bfloat16's 8 bits, in a row.
PRECISIONS = {
    "float32": ("float32", torch.float32, 3e-7, 3e-6),
    "bfloat16": ("bfloat16", torch.float32, 1e-3, 3e-2),
    "bfloat16 parameters": ("bfloat16", torch.bfloat16, 1e-3, 3e-2),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", ["default", "geglu experts, untied", "caps and smoothing"])
def test_rounding_is_the_dtypes(case: str, precision: str) -> None:
    """float32 and bfloat16 against the float64 oracle, with the same routing (asserted)."""
    compute_dtype, dtype, loss_tolerance, tolerance = PRECISIONS[precision]
    config = dataclasses.replace(config_of(case), compute_dtype=compute_dtype)
    if compute_dtype == "bfloat16" and config.expert_activation == "relu":
        # A pre-activation that rounds across 0 turns a ReLU's whole gradient on or off: no bound of rounding holds.
        config = dataclasses.replace(config, expert_activation="gelu")
    parameters, batch = parameters_with_margins(config), batch_of(config)
    batch["weights"] = batch["weights"].float()
    expected = oracle_output(config, parameters)
    model = glam_ext.GLaM(config).to(dtype)
    model.load_state_dict(parameters)
    loss = model.loss(**batch)
    rows_of_expert = torch.stack([(c != 0).sum((0, 1, 3)) for c in expected.combine_of_layer])
    assert torch.equal(loss.router_statistics[:, : config.num_experts], rows_of_expert)
    assert loss.router_statistics[:, config.num_experts : config.num_experts + 2].sum() > 0
    assert expected.loss_sum is not None
    for actual, wanted in ((loss.loss_sum, expected.loss_sum), (loss.aux, expected.aux)):
        assert actual.dtype == torch.float32
        assert abs(actual.item() - wanted.item()) <= loss_tolerance * abs(wanted.item())
    total_of(loss.loss_sum, loss.aux, loss.router_z).backward()
    leaves = {name: value.requires_grad_() for name, value in parameters.items()}
    wanted_gradients = expected_gradients(config, leaves)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
        wanted = wanted_gradients[name]
        error = (parameter.grad.double() - wanted).norm() / wanted.norm()
        assert error <= tolerance, f"{name}: {error:.2e}"
