"""Random numbers from counters, and the choice of a token from logits with one of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from . import levels

uniform_of = torch.ops.glam.counter_uniform
sample = torch.ops.glam.sample_logits


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize(
    ("seed", "stream", "index", "first_word"),
    [
        # Known answers of Philox 4x32-10 (Random123): the counter's words are index low, high, stream low, high.
        (0, 0, 0, 0x6627E8D5),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, 0x408F276D),
        (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88, 0xD16CFE09),
    ],
)
def test_counter_uniform_is_philox(seed: int, stream: int, index: int, first_word: int) -> None:
    found = uniform_of(signed(seed), signed(stream), torch.tensor([signed(index)]))
    assert found.dtype == torch.float32
    assert found.item() == (first_word >> 8) / 2**24


def test_counter_uniform_depends_on_its_counters_alone() -> None:
    index = torch.arange(60_000).view(200, 300)
    whole = uniform_of(7, 3, index)
    assert whole.shape == index.shape
    assert torch.equal(uniform_of(7, 3, index[13:14, 5:9]), whole[13:14, 5:9])
    assert torch.equal(uniform_of(7, 3, index.t()), whole.t())
    for other in (uniform_of(8, 3, index), uniform_of(7, 4, index), uniform_of(7, 3, index + 60_000)):
        assert (other == whole).double().mean() < 1e-3
    for count in (1, 2, 3, 7):
        with levels.threads(count):
            assert torch.equal(uniform_of(7, 3, index), whole)
    # Uniform: mean 1/2 +- 5 sigma (sigma = sqrt(1/12/60000) = 0.0012), and all sixteenths equally full (sigma 59.3).
    assert abs(whole.double().mean() - 0.5) < 0.006
    assert (torch.histc(whole, 16, 0, 1) - 3750).abs().max() < 300
    assert whole.min() >= 0
    assert whole.max() < 1


def test_counter_uniform_opcheck() -> None:
    torch.library.opcheck(torch.ops.glam.counter_uniform.default, (1, 2, torch.arange(6).view(2, 3)))


def draws(p: list[float], u: list[float], *options: Any) -> list[int]:
    logits = torch.tensor([p], dtype=torch.float64).log().expand(len(u), -1)
    return sample(logits, torch.tensor(u, dtype=torch.float32), *options).tolist()


def test_sampling_walks_the_candidates_from_the_largest() -> None:
    # Order: index 1 (0.5), index 2 (0.3), index 0 (0.2). Running weights 0.5, 0.8, 1.
    p = [0.2, 0.5, 0.3]
    assert draws(p, [0.0, 0.49, 0.51, 0.79, 0.81, 0.99]) == [1, 1, 2, 2, 0, 0]


def test_top_k_and_top_p_keep_the_largest() -> None:
    p = [0.2, 0.5, 0.3]
    # Two candidates: weights 0.5 and 0.3 of 0.8, so the border is at 0.625.
    assert draws(p, [0.62, 0.63, 0.99], 1.0, 2) == [1, 2, 2]
    assert draws(p, [0.99], 1.0, 1) == [1]
    # top_p 0.7: 0.5 is not enough, 0.5 + 0.3 is. top_p 0.4: one candidate.
    assert draws(p, [0.62, 0.63, 0.99], 1.0, 0, 0.7) == [1, 2, 2]
    assert draws(p, [0.99], 1.0, 0, 0.4) == [1]
    # Both: top_p is of the weight that top_k left, 0.5 / 0.8 = 0.625 >= 0.6.
    assert draws(p, [0.99], 1.0, 2, 0.6) == [1]


def test_temperature_scales_the_logits() -> None:
    # Temperature 0.5 squares the weights: 0.25, 0.09, 0.04 of 0.38, borders at 0.6579 and 0.8947.
    assert draws([0.2, 0.5, 0.3], [0.65, 0.66, 0.89, 0.90], 0.5) == [1, 2, 2, 0]
    # Temperature 0 takes the largest, the lowest index among equals.
    assert draws([0.3, 0.35, 0.35], [0.99], 0.0) == [1]


def test_equal_logits_are_ordered_by_index() -> None:
    assert draws([0.25] * 4, [0.1, 0.3, 0.6, 0.9]) == [0, 1, 2, 3]
    assert draws([0.25] * 4, [0.9], 1.0, 2) == [1]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0]]).expand(50, -1)
    found = sample(logits, torch.rand(50, generator=torch.Generator().manual_seed(0)))
    assert set(found.tolist()) == {1, 3}


def test_frequencies_follow_the_weights() -> None:
    p = torch.tensor([0.05, 0.4, 0.25, 0.3])
    uniform = uniform_of(1, 0, torch.arange(20_000))
    counts = torch.bincount(sample(p.log().expand(20_000, -1), uniform), minlength=4) / 20_000
    assert (counts - p).abs().max() < 0.018  # five sigma of the most frequent: 5 sqrt(0.4 * 0.6 / 20000)


def test_a_row_does_not_depend_on_its_batch_or_on_threads() -> None:
    logits = 3 * torch.randn(64, 501, generator=torch.Generator().manual_seed(1))
    uniform = uniform_of(2, 0, torch.arange(64))
    whole = sample(logits, uniform, 0.8, 40, 0.9)
    for row in (0, 17, 63):
        assert sample(logits[row : row + 1], uniform[row : row + 1], 0.8, 40, 0.9).item() == whole[row]
    for count in (1, 2, 3, 7):
        with levels.threads(count):
            assert torch.equal(sample(logits, uniform, 0.8, 40, 0.9), whole)


def test_sample_logits_opcheck() -> None:
    args = (torch.randn(3, 7, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 0.5, 0.9]), 0.8, 3, 0.9)
    torch.library.opcheck(torch.ops.glam.sample_logits.default, args)


@pytest.mark.parametrize(
    ("logits", "uniform", "options", "text"),
    [
        (torch.zeros(3), torch.zeros(3), (), "logits"),
        (torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3), (), "logits"),
        (torch.zeros(3, 4), torch.zeros(2), (), "uniform"),
        (torch.zeros(3, 4), torch.zeros(3).double(), (), "uniform"),
        (torch.zeros(3, 4), torch.zeros(3), (-1.0,), "temperature"),
        (torch.zeros(3, 4), torch.zeros(3), (1.0, -1), "top_k"),
        (torch.zeros(3, 4), torch.zeros(3), (1.0, 0, 0.0), "top_p"),
        (torch.zeros(3, 4), torch.zeros(3), (1.0, 0, 1.5), "top_p"),
        (torch.full((3, 4), math.nan), torch.zeros(3), (), "logits"),
        (torch.full((3, 4), -math.inf), torch.zeros(3), (), "largest logit"),
        (torch.zeros(3, 0), torch.zeros(3), (), "logits"),
    ],
)
def test_bad_input(logits: Tensor, uniform: Tensor, options: tuple[Any, ...], text: str) -> None:
    with pytest.raises(RuntimeError, match=rf"glam::sample_logits: expected .*{text}"):
        sample(logits, uniform, *options)
