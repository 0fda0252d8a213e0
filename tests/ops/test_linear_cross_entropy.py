"""Cross entropy of a linear output layer whose logits never exist as a whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from . import levels, samples


class TestLinearCrossEntropy(levels.OpTests):
    op = samples.LINEAR_CROSS_ENTROPY


def test_by_hand() -> None:
    # Logits 2 * (0, ln 2 / 2, ln 5 / 2) = (0, ln 2, ln 5): lse = ln 8. nll of word 2: ln 8 - ln 5.
    # loss_sum = 3 * (ln 8 - ln 5 + 0.1 (ln 8)^2).
    hidden = torch.ones(1, 1, dtype=torch.float64)
    table = torch.tensor([[0.0], [math.log(2) / 2], [math.log(5) / 2]], dtype=torch.float64)
    weights = torch.tensor([3.0], dtype=torch.float64)
    target = torch.tensor([2])
    loss_sum, nll, lse = torch.ops.glam.linear_cross_entropy(hidden, table, target, weights, 2.0, 0.1)
    assert abs(lse.item() - math.log(8)) < 1e-12
    assert abs(nll.item() - math.log(8 / 5)) < 1e-12
    assert abs(loss_sum.item() - 3 * (math.log(8 / 5) + 0.1 * math.log(8) ** 2)) < 1e-12
    # Smoothing 0.3 moves 0.3 of the target to the mean over all words: the mean logit is (ln 2 + ln 5) / 3.
    loss_sum, nll, _ = torch.ops.glam.linear_cross_entropy(hidden, table, target, None, 2.0, 0.0, 0.3)
    expected = 0.7 * math.log(8 / 5) + 0.3 * (math.log(8) - math.log(10) / 3)
    assert abs(loss_sum.item() - expected) < 1e-12
    assert abs(nll.item() - math.log(8 / 5)) < 1e-12


@pytest.mark.parametrize("output", [1, 2])
def test_a_gradient_at_nll_or_lse_is_refused(output: int) -> None:
    sample = samples.LINEAR_CROSS_ENTROPY.find("small", torch.float32, "T=6 D=5 V=7 (1.0, 0.0, 0.0, 0.0)")
    outputs = samples.LINEAR_CROSS_ENTROPY(*levels.require_grad(sample))
    with pytest.raises(RuntimeError, match="glam::linear_cross_entropy: "):
        (outputs[0] + outputs[output].sum()).backward()


def test_very_large_logits_stay_finite() -> None:
    hidden = torch.full((2, 3), 100.0, requires_grad=True)
    table = torch.stack([torch.full((3,), 100.0), torch.full((3,), -100.0)]).requires_grad_()
    loss_sum, nll, lse = torch.ops.glam.linear_cross_entropy(hidden, table, torch.tensor([0, 1]), None)
    assert nll.tolist() == [0.0, 60000.0]
    assert lse.tolist() == [30000.0, 30000.0]
    loss_sum.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_a_token_of_weight_zero_adds_nothing() -> None:
    sample = samples.LINEAR_CROSS_ENTROPY.find("small", torch.float64, "T=7 D=4 V=9 (0.5, 0.01, 0.0, 0.0)")
    hidden, table, targets, weights, *rest = sample.args
    kept = weights > 0
    assert 0 < int(kept.sum()) < 7
    whole = levels.run(samples.LINEAR_CROSS_ENTROPY, sample.args)[0]
    part = samples.LINEAR_CROSS_ENTROPY(hidden[kept], table, targets[kept], weights[kept], *rest)[0]
    torch.testing.assert_close(whole, part, rtol=1e-13, atol=0)


def test_nothing_of_padding_enters_a_gradient() -> None:
    hidden, table = torch.randn(6, 5), torch.randn(9, 5)
    hidden[2] = torch.nan
    targets, weights = torch.tensor([1, 2, 0, 4, 8, 3]), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    kept = weights > 0
    gradients = []
    for rows in (slice(None), kept):
        h, e = hidden[rows].clone().requires_grad_(), table.clone().requires_grad_()
        torch.ops.glam.linear_cross_entropy(h, e, targets[rows], weights[rows], 0.7, 1e-2)[0].backward()
        assert h.grad is not None
        gradients.append((h.grad, e.grad))
    assert (gradients[0][0][2] == 0).all()
    assert torch.equal(gradients[0][0][kept], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def plain(hidden: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    nll = torch.nn.functional.cross_entropy(hidden @ table.t(), targets, reduction="none")
    return (weights * nll).sum()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_token_with_non_finite_logits(bad: float) -> None:
    """Its loss and gradient are NaN, the other tokens' are as they would be."""
    hidden, table, targets, *_ = samples.LINEAR_CROSS_ENTROPY.samples("small", torch.float32)[0].args
    results = []
    for value in (0.5, bad):
        h, t = hidden.clone(), table.clone().requires_grad_()
        h[1, 0] = value
        h.requires_grad_()
        loss, nll, lse = torch.ops.glam.linear_cross_entropy(h, t, targets, None)
        loss.backward()
        assert h.grad is not None
        results.append([nll, lse, h.grad])
        assert loss.isnan().item() == (value != 0.5)
    others = [0, *range(2, len(targets))]
    for finite, strange in zip(*results, strict=True):
        assert strange[1].isnan().all()
        assert torch.equal(strange[others], finite[others])


# 131,072 columns are the most for which anything is kept; a block is 256 tokens of them, 512 in bfloat16.
@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "dtype"),
    [
        (300, 131_072, torch.float32),
        (520, 131_072, torch.bfloat16),
        (5, 131_073, torch.float32),
        (5, 131_073, torch.bfloat16),
        (3, 262_300, torch.float32),
        (3, 262_300, torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_large_vocabularies(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, 8, generator=generator).to(dtype).requires_grad_()
    table = torch.randn(vocabulary, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, generator=generator)
    loss = torch.ops.glam.linear_cross_entropy(hidden, table, targets, weights)[0]
    grads = torch.autograd.grad(loss, [hidden, table], torch.tensor(0.5))
    wide = [hidden.detach().double().requires_grad_(), table.detach().double().requires_grad_()]
    expected = torch.autograd.grad(plain(*wide, targets, weights.double()), wide, torch.tensor(0.5).double())
    for name, got, want in zip(("hidden", "embedding"), grads, expected, strict=True):
        levels.assert_close(got, want, levels.GRADIENT_TOLERANCE[dtype], name)


@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
def test_the_same_with_and_without_gradients(dtype: torch.dtype) -> None:
    """Bits of the outputs do not depend on who wants a gradient, nor one gradient on the other."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(33, 17, generator=generator).to(dtype)
    table = torch.randn(1500, 17, generator=generator).to(dtype)
    targets = torch.randint(1500, (33,), generator=generator)
    results, gradients = [], []
    for needed in ((False, False), (True, False), (False, True), (True, True)):
        inputs = [x.clone().requires_grad_(need) for x, need in zip((hidden, table), needed, strict=True)]
        outputs = torch.ops.glam.linear_cross_entropy(*inputs, targets, None)
        results.append([out.detach() for out in outputs])
        if any(needed):
            (outputs[0] * 0.3).backward()
        gradients.append([x.grad for x in inputs])
    for outputs in results[1:]:
        levels.assert_same_bits(outputs, results[0], "outputs")
    (none, _), (hidden_alone, no_table), (no_hidden, table_alone), both = gradients
    assert none is None
    assert no_table is None
    assert no_hidden is None
    levels.assert_same_bits([hidden_alone, table_alone], both, "gradients")


def test_a_retained_graph_gives_the_same_gradients_again() -> None:
    sample = samples.LINEAR_CROSS_ENTROPY.find("small", torch.float32, "T=7 D=4 V=9 (0.5, 0.01, 0.0, 0.0)")
    args = levels.require_grad(sample)
    loss = samples.LINEAR_CROSS_ENTROPY(*args)[0]
    first = torch.autograd.grad(3 * loss, args[:2], retain_graph=True)
    second = torch.autograd.grad(3 * loss, args[:2], retain_graph=True)
    last = torch.autograd.grad(3 * loss, args[:2])
    levels.assert_same_bits(second, first, "second")
    levels.assert_same_bits(last, first, "last")


BASE = samples.LINEAR_CROSS_ENTROPY.find("small", torch.float32, "T=7 D=4 V=9 (0.5, 0.01, 0.0, 0.0)")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(7)}, "hidden"),
        ({0: torch.zeros(7, 4, dtype=torch.int64)}, "hidden"),
        ({1: torch.zeros(9, 5)}, "embedding"),
        ({1: torch.zeros(9, 4, dtype=torch.float64)}, "embedding"),
        ({1: torch.zeros(9, 4, dtype=torch.float16)}, "embedding"),
        ({2: torch.zeros(6, dtype=torch.int64)}, "targets"),
        ({2: torch.zeros(7)}, "targets"),
        ({2: torch.full((7,), 9)}, "targets"),
        ({2: torch.full((7,), -1)}, "targets"),
        ({3: torch.zeros(6)}, "weights"),
        ({7: -1.0}, "logit_cap"),
        ({6: 1.5}, "label_smoothing"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.LINEAR_CROSS_ENTROPY, BASE, changes, text)
