"""Initial values: the published distribution of every tensor; numbers that depend on seed, name and expert alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from glam_ext import GLaM, GLaMConfig
from tests.ops.levels import busy_threads, threads

from .helpers import assert_same_bits

# Pairwise different sizes, so that no standard deviation stands for another.
CONFIG = GLaMConfig(
    vocab_size=700,
    num_layers=2,
    model_dim=96,
    hidden_dim=160,
    num_heads=6,
    head_dim=20,
    num_experts=5,
    expert_activation="geglu",
    tie_embedding=False,
)
D, F, H, A = 96, 160, 6, 20
NORMAL = {
    "embedding.weight": 1.0,
    "output.weight": 1.0,
    "attention.q": (D * A) ** -0.5,
    "attention.k": D**-0.5,
    "attention.v": D**-0.5,
    "attention.o": (H * A) ** -0.5,
    "attention.relative_bias": (32 * H) ** -0.5,
}
UNIFORM_FAN_IN = {"ffn.w0": D, "ffn.w1": D, "ffn.wo": F, "moe.router": D, "moe.wi": D, "moe.wg": D, "moe.wo": F}


def values_of(config: GLaMConfig, seed: int = 0) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in GLaM(config, seed=seed).named_parameters()}


def kind_of(name: str) -> str:
    return ".".join(name.split(".")[-2:])


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return values_of(CONFIG)


def test_every_tensor_has_its_distribution(values: dict[str, Tensor]) -> None:
    seen = set()
    for name, value in values.items():
        kind = kind_of(name)
        seen.add(kind)
        if kind.endswith(".scale"):
            assert torch.all(value == 1), name
            continue
        assert value.unique().numel() > 0.98 * min(value.numel(), 2**16), f"{name}: repeated values"
        for matrix in value.double() if value.dim() == 3 else value.double()[None]:
            # Four standard errors of the mean and of the standard deviation (kurtosis 3, 1.8 when uniform).
            uniform = kind in UNIFORM_FAN_IN
            std = UNIFORM_FAN_IN[kind] ** -0.5 if uniform else NORMAL[kind]
            error = std / math.sqrt(matrix.numel())
            assert abs(matrix.mean()) < 4 * error, name
            assert abs(matrix.std() - std) < 4 * error * (0.45 if uniform else 0.71), name
            if uniform:
                bound = math.sqrt(3) * std
                assert 0.98 * bound < matrix.abs().max() <= bound, name
                assert matrix.min() < -0.98 * bound, name
            else:
                assert 2.5 * std < matrix.abs().max() < 6 * std, name
                inside = (matrix.abs() < std).double().mean()
                assert abs(inside - 0.6827) < 4 * 0.466 / math.sqrt(matrix.numel()), name
    assert seen == {*NORMAL, *UNIFORM_FAN_IN, "attention_norm.scale", "ffn_norm.scale", "final_norm.scale"}


def test_tensors_and_experts_are_independent(values: dict[str, Tensor]) -> None:
    parts = {name: value for name, value in values.items() if value.dim() == 2}
    parts |= {f"{n}.{e}": expert for n, value in values.items() if value.dim() == 3 for e, expert in enumerate(value)}
    flat = {name: part.flatten()[:192].double() for name, part in parts.items() if part.numel() >= 192}
    names = list(flat)
    correlation = torch.corrcoef(torch.stack([flat[name] for name in names])).abs().fill_diagonal_(0)
    assert correlation.max() < 5 / math.sqrt(192), names[int(correlation.max(1).values.argmax())]


@pytest.mark.parametrize("experts", [2, 8])
def test_an_expert_does_not_depend_on_how_many_there_are(values: dict[str, Tensor], experts: int) -> None:
    other = values_of(GLaMConfig(**{**CONFIG.to_dict(), "num_experts": experts}))
    shared = min(experts, CONFIG.num_experts)
    for name, value in values.items():
        if value.dim() == 3:
            assert torch.equal(other[name][:shared], value[:shared]), name
        elif kind_of(name) != "moe.router":
            assert torch.equal(other[name], value), name


def test_a_layer_does_not_depend_on_how_many_there_are(values: dict[str, Tensor]) -> None:
    other = values_of(GLaMConfig(**{**CONFIG.to_dict(), "num_layers": 4}))
    assert_same_bits({name: other[name] for name in values}, values)


def test_the_seed_changes_every_tensor(values: dict[str, Tensor]) -> None:
    for seed in (1, -1, 2**40):
        for name, value in values_of(CONFIG, seed).items():
            if not name.endswith("scale"):
                assert (value == values[name]).double().mean() < 0.01, name
    assert_same_bits(values_of(CONFIG), values)


def test_threads_do_not_change_the_numbers(values: dict[str, Tensor]) -> None:
    for count in (1, 2, 3, 7):
        with threads(count):
            assert_same_bits(values_of(CONFIG), values)
    with threads(2):
        assert busy_threads(lambda: GLaM(CONFIG)) > 1


def philox(seed: int, stream: int, index: int) -> list[int]:
    """The four 32-bit words of Philox 4x32-10 (Salmon et al., SC 2011) with the seed as its key."""
    low, high = (index % 2**32, stream % 2**32), (index >> 32, stream >> 32)
    counter, key = [low[0], high[0], low[1], high[1]], [seed % 2**32, seed >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second % 2**32, first >> 32 ^ counter[3] ^ key[1], first % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def fnv1a(name: str) -> int:
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def test_numbers_are_the_documented_function_of_seed_name_and_index(values: dict[str, Tensor]) -> None:
    # Runs that are to be repeated, and every other layout of the experts, rest on exactly this function.
    for index in (0, 1, 95, 96 * 160 - 1):
        words = [word // 256 / 2**24 for word in philox(0, fnv1a("layers.0.moe.wi#3"), index)]
        expected = (2 * words[0] - 1) * math.sqrt(3 / D)
        assert values["layers.0.moe.wi"][3].flatten()[index].item() == torch.tensor(expected).item()
        words = [word // 256 / 2**24 for word in philox(0, fnv1a("layers.1.attention.k"), index % (D * H * A))]
        expected = math.sqrt(-2 * math.log1p(-words[0])) * math.cos(2 * math.pi * words[1]) * D**-0.5
        actual = values["layers.1.attention.k"].flatten()[index % (D * H * A)].item()
        assert actual == pytest.approx(expected, rel=1e-6)
