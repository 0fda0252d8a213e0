"""Top-2 gating: every level on the shared samples, and golden cases whose numbers are derived in the comments.

Probabilities p are given as logits log p, so that the softmax is p itself.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import gating

from . import levels, samples


def formula(
    logits: Tensor,
    mask: Tensor | None,
    noise: Tensor | None,
    group: int,
    capacity: int,
    policy: str,
    threshold: float,
    before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gates and aux as a formula of the logits, at the decisions of the loop form."""
    slow = gating.top2_gating(logits.detach(), mask, noise, group, capacity, policy, threshold, before)
    gates, aux = gating.gates_and_aux(logits, slow.expert_ids, slow.positions, mask, group, before)
    return gates, slow.expert_ids, slow.positions, aux


class TestTop2Gating(levels.OpTests):
    op = samples.TOP2_GATING
    formula = staticmethod(formula)


def gate(
    p: list[list[float]],
    *,
    mask: list[bool] | None = None,
    noise: Any = None,
    group_size: int = -1,
    capacity: int = -1,
    policy: str = "all",
    threshold: float = 0.0,
    before: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = torch.tensor([[math.log(v) for v in row] for row in p], dtype=dtype)
    return gate_logits(logits, mask, noise, group_size, capacity, policy, threshold, before)


def gate_logits(
    logits: Tensor,
    mask: list[bool] | None = None,
    noise: Any = None,
    group_size: int = -1,
    capacity: int = -1,
    policy: str = "all",
    threshold: float = 0.0,
    before: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    token_mask = None if mask is None else torch.tensor(mask)
    uniform = None if noise is None else torch.tensor(noise, dtype=torch.float32)
    return torch.ops.glam.top2_gating(logits, token_mask, uniform, group_size, capacity, policy, threshold, before)


def assert_gates(actual: Tensor, expected: list[list[float]]) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=1e-6 if actual.dtype == torch.float32 else 5e-9)


def test_samples_contain_every_kind_of_choice() -> None:
    """Dropped first and second choices, skipped and masked ones, an expert without tokens."""
    dropped_first = dropped_second = skipped = masked = empty = partly = 0
    for level in ("small", "tiles", "edges"):
        for sample in samples.TOP2_GATING.samples(level, torch.float32):
            logits, mask, *_ = sample.args
            _, ids, positions, _ = samples.TOP2_GATING.reference(*levels.to_double(samples.TOP2_GATING, sample.args))
            real = torch.ones(logits.shape[0], dtype=torch.bool) if mask is None else mask
            dropped_first += int((positions[:, 0] == gating.OVER_CAPACITY).sum())
            dropped_second += int((positions[:, 1] == gating.OVER_CAPACITY).sum())
            skipped += int((positions[real][:, 1] == gating.MASKED).sum())
            masked += int((~real).sum())
            empty += logits.shape[1] > len(ids[positions >= 0].unique())
            partly += int(((positions[:, 0] >= 0) & (positions[:, 1] == gating.OVER_CAPACITY)).sum())
    assert min(dropped_first, dropped_second, skipped, masked, empty, partly) > 0


@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
def test_without_capacity_a_tokens_gates_do_not_depend_on_the_others(dtype: torch.dtype) -> None:
    logits = samples.TOP2_GATING.find("tiles", dtype, "T=257 E=17 S=-1").args[0]
    gates, ids, *_ = torch.ops.glam.top2_gating(logits, None, None, -1)
    for t in (0, 1, 128, 256):
        alone = torch.ops.glam.top2_gating(logits[t : t + 1], None, None, -1)
        levels.assert_same_bits(alone[:2], [gates[t : t + 1], ids[t : t + 1]], f"token {t}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gates_are_the_two_largest_probabilities_over_their_sum(dtype: torch.dtype) -> None:
    # (0.5, 0.3, 0.2): 0.5 / 0.8 = 0.625 and 0.3 / 0.8 = 0.375. (0.1, 0.2, 0.7): 0.7 / 0.9 and 0.2 / 0.9.
    # f = (1/2, 0, 1/2), m = (0.3, 0.25, 0.45): aux = 3 (0.15 + 0.225) = 1.125.
    gates, ids, positions, aux = gate([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=dtype)
    assert gates.dtype == dtype
    assert ids.dtype == positions.dtype == torch.int32
    assert aux.dtype == dtype
    assert ids.tolist() == [[0, 1], [2, 1]]
    assert positions.tolist() == [[0, 0], [0, 1]]
    assert_gates(gates, [[0.625, 0.375], [0.7 / 0.9, 0.2 / 0.9]])
    assert_gates(aux[None], [[1.125]])


def test_ties_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [2.0, 2.0, 2.0], [0.0, 1.0, 0.0]])
    gates, ids, _, _ = gate_logits(logits)
    # Equal gates are one half each; the last token's are e / (e + 1) and 1 / (e + 1).
    assert ids.tolist() == [[0, 1], [1, 2], [0, 1], [1, 0]]
    assert_gates(gates, [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [math.e / (math.e + 1), 1 / (math.e + 1)]])


# First choices: token 0 -> expert 0, tokens 1 and 2 -> expert 1. Second choices the other way round.
# Slots: expert 0 has token 0 at 0; then seconds of token 1 at 1 and of token 2 at 2. Expert 1 has tokens 1, 2 at 0, 1,
# then the second of token 0 at 2, although token 0 comes first. With two slots, tokens 0 and 2 lose their second one.
ORDER = [[0.6, 0.4], [0.4, 0.6], [0.4, 0.6]]


def test_every_first_choice_comes_before_any_second_choice() -> None:
    gates, ids, positions, _ = gate(ORDER)
    assert ids.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert positions.tolist() == [[0, 2], [0, 1], [1, 2]]
    gates, _, positions, _ = gate(ORDER, capacity=2)
    assert positions.tolist() == [[0, -2], [0, 1], [1, -2]]
    # Normalised before capacity: what is left of a token keeps its weight below one.
    assert_gates(gates, [[0.6, 0.0], [0.6, 0.4], [0.6, 0.0]])


def test_normalising_after_capacity_gives_the_whole_weight_to_what_is_left() -> None:
    gates, _, positions, aux = gate(ORDER, capacity=2, before=False)
    assert positions.tolist() == [[0, -2], [0, 1], [1, -2]]
    assert_gates(gates, [[1.0, 0.0], [0.6, 0.4], [1.0, 0.0]])
    # aux does not know of it: f = (1/3, 2/3), m = (1.4/3, 1.6/3), aux = 2 (1.4 + 3.2) / 9.
    assert_gates(aux[None], [[2 * 4.6 / 9]])


def test_over_capacity_first_and_second_choices() -> None:
    # All three want expert 0, then 1; one slot each. Tokens 1 and 2 lose everything. f and m are taken before capacity:
    # f = (1, 0), m0 = 0.7, aux = 2 * 0.7.
    gates, _, positions, aux = gate([[0.7, 0.3]] * 3, capacity=1)
    assert positions.tolist() == [[0, 0], [-2, -2], [-2, -2]]
    assert_gates(gates, [[0.7, 0.3], [0.0, 0.0], [0.0, 0.0]])
    assert_gates(aux[None], [[1.4]])


def test_a_lost_first_choice_leaves_the_second() -> None:
    # Expert 0 has one slot, taken by token 0; the second choices go to experts 1 and 2 and are kept.
    p = [[0.5, 0.3, 0.2], [0.5, 0.2, 0.3]]
    assert gate(p, capacity=1)[2].tolist() == [[0, 0], [-2, 0]]
    assert_gates(gate(p, capacity=1)[0], [[0.625, 0.375], [0.0, 0.375]])
    assert_gates(gate(p, capacity=1, before=False)[0], [[0.625, 0.375], [0.0, 1.0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_underflowed_second_choice_uses_its_slot_and_gets_no_row(dtype: torch.dtype) -> None:
    # Token 0: exp(-10000) = 0, so all that is left after expert 1 is zero, and the lowest index, expert 0, is chosen
    # with gate 0. It takes slot 0 of expert 0; token 1's second choice gets slot 1. First gate: 1 / (1 + 0 + 1e-9).
    logits = torch.tensor([[-1e4, 0.0], [math.log(0.4), math.log(0.6)]], dtype=dtype)
    gates, ids, positions, _ = gate_logits(logits)
    assert ids.tolist() == [[1, 0], [1, 0]]
    assert positions.tolist() == [[0, -3], [1, 1]]
    assert_gates(gates, [[1.0, 0.0], [0.6, 0.4]])
    # One slot fewer than needed: token 1 is over capacity in both experts because the slot of the empty choice counts.
    assert gate_logits(logits, capacity=1)[2].tolist() == [[0, -3], [-2, -2]]


def test_an_underflowed_second_choice_can_be_the_first_expert_and_over_capacity_wins() -> None:
    # Both tokens: expert 0 has probability 1, the rest is zero, so the second choice is expert 0 again. First choices
    # take slots 0 and 1, the second of token 0 slot 2 (-3), that of token 1 would take slot 3: over capacity (-2).
    logits = torch.tensor([[0.0, -1e4, -1e4]] * 2)
    gates, ids, positions, aux = gate_logits(logits, capacity=3)
    assert ids.tolist() == [[0, 0], [0, 0]]
    assert positions.tolist() == [[0, -3], [1, -2]]
    assert_gates(gates, [[1.0, 0.0], [1.0, 0.0]])
    assert_gates(aux[None], [[3.0]])  # f0 = m0 = 1, times E = 3


def test_one_expert_is_chosen_twice_and_used_once() -> None:
    gates, ids, positions, aux = gate_logits(torch.tensor([[0.3], [-2.0]]))
    assert ids.tolist() == [[0, 0], [0, 0]]
    assert positions.tolist() == [[0, -3], [1, -3]]
    assert_gates(gates, [[1.0, 0.0], [1.0, 0.0]])
    assert_gates(aux[None], [[1.0]])


def test_masked_tokens_take_no_slot_and_no_weight() -> None:
    # Token 1 is padding: tokens 0 and 2 get slots 0 and 1. The means divide by all three tokens:
    # f0 = 2/3, m0 = 2 * 0.6 / 3 = 0.4, aux = 2 * (2/3) * 0.4 = 1.6/3.
    gates, ids, positions, aux = gate([[0.6, 0.4]] * 3, mask=[True, False, True], capacity=2)
    assert positions.tolist() == [[0, 0], [-1, -1], [1, 1]]
    assert_gates(gates, [[0.6, 0.4], [0.0, 0.0], [0.6, 0.4]])
    assert_gates(aux[None], [[1.6 / 3]])
    assert ids.min() >= 0
    assert ids.max() < 2


def test_each_group_counts_its_own_slots() -> None:
    # Two groups of two like tokens, one slot: the second token of each group is over capacity. f0 = 1, m0 = 0.8.
    _gates, _, positions, aux = gate([[0.8, 0.2]] * 4, group_size=2, capacity=1)
    assert positions.tolist() == [[0, 0], [-2, -2], [0, 0], [-2, -2]]
    assert_gates(aux[None], [[1.6, 1.6]])
    # Balanced and unbalanced groups: (1/2 * 1/2 + 1/2 * 1/2) * 2 = 1, and 2 * 0.8 again.
    assert_gates(gate([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.8, 0.2]], group_size=2)[3][None], [[1.0, 1.6]])


def test_random_policy_keeps_the_second_choice_below_its_probability() -> None:
    # Normalised second gate 0.25, threshold 0.5: kept iff 0.5 u < 0.25, i.e. u < 0.5. A skipped one takes no slot, so
    # token 2 gets slot 1.
    p, noise = [[0.75, 0.25]] * 3, [0.49, 0.51, 0.0]
    gates, _, positions, _ = gate(p, noise=noise, policy="random", threshold=0.5)
    assert positions.tolist() == [[0, 0], [1, -1], [2, 1]]
    assert_gates(gates, [[0.75, 0.25], [0.75, 0.0], [0.75, 0.25]])
    gates, _, _, _ = gate(p, noise=noise, policy="random", threshold=0.5, before=False)
    assert_gates(gates, [[0.75, 0.25], [1.0, 0.0], [0.75, 0.25]])
    # Threshold 0 divides by 1e-9: always kept.
    assert gate(p, noise=[0.999] * 3, policy="random")[2].tolist() == [[0, 0], [1, 1], [2, 2]]
    # An underflowed second choice has probability 0 and is skipped: 0 < 0 is false.
    logits = torch.tensor([[0.0, -1e4]])
    assert gate_logits(logits, noise=[0.0], policy="random")[2].tolist() == [[0, -1]]


def test_sampling_adds_gumbel_noise_to_the_other_experts() -> None:
    # -log(-log 0.1) = -0.834, -log(-log 0.9) = 2.250: log 0.3 - 0.834 = -2.038, log 0.2 + 2.250 = 0.641: expert 2.
    # The first expert's own noise does not matter. Gates 0.5 / 0.7 and 0.2 / 0.7.
    p = [[0.5, 0.3, 0.2]] * 2
    gates, ids, _, _ = gate(p, noise=[[0.9, 0.1, 0.9], [0.9999, 0.9, 0.1]], policy="sampling")
    assert ids.tolist() == [[0, 2], [0, 1]]
    assert_gates(gates, [[0.5 / 0.7, 0.2 / 0.7], [0.625, 0.375]])


def test_sampling_never_draws_an_expert_whose_noise_is_not_a_number() -> None:
    """Also in a warp's later experts; with no choice it is expert 0, here the first one again, with the gate 0."""
    p = [[0.4, *[0.6 / 39] * 39]] * 3
    noise = [[0.5] * 40 for _ in p]
    noise[0][1] = noise[0][33] = math.nan
    noise[0][34] = 0.9
    noise[1] = [math.nan] * 40
    noise[2][0], noise[2][39] = math.nan, 0.9
    _, ids, positions, _ = gate(p, noise=noise, policy="sampling")
    assert ids.tolist() == [[0, 34], [0, 0], [0, 39]]
    assert positions.tolist() == [[0, 0], [1, -3], [2, 0]]


def test_sampling_follows_the_distribution_without_the_first_expert() -> None:
    # Given the first expert (0.5), the others are drawn in proportion 0.3 : 0.2, i.e. 0.6 : 0.4.
    # 4000 draws: standard deviation 0.0077; five of them are allowed.
    p = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(4000, 1)
    noise = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    _, ids, _, _ = torch.ops.glam.top2_gating(p, None, noise, -1, -1, "sampling", 0.0, True)
    assert (ids[:, 0] == 0).all()
    assert abs((ids[:, 1] == 1).double().mean() - 0.6) < 0.039


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_with_a_non_finite_logit(bad: float) -> None:
    # It goes to experts 0 and 1 and counts there; the others keep finite gates; the group's aux is not a number.
    p = torch.tensor([[0.5, 0.3, 0.2]] * 4).log()
    p[1, 2] = bad
    gates, ids, positions, aux = gate_logits(p, group_size=2)
    assert ids[1].tolist() == [0, 1]
    assert positions.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert gates[1].isnan().all()
    assert_gates(gates[[0, 2, 3]], [[0.625, 0.375]] * 3)
    assert aux[0].isnan()
    assert aux[1].isfinite()


def test_gradient_goes_through_kept_gates_and_the_mean_probability_only() -> None:
    # Two experts: first gate p0 / (p0 + p1 + 1e-9), whose derivative in z0 is p0 p1 = 0.24, although token 0's second
    # choice is dropped. Normalised after capacity, the same gate is 1 and has no gradient.
    for before, expected in ((True, [0.24, -0.24]), (False, [0.0, 0.0])):
        logits = torch.tensor(ORDER, dtype=torch.float64).log().requires_grad_()
        gates, _, _, aux = gate_logits(logits, capacity=2, before=before)
        (grad,) = torch.autograd.grad(gates[0, 0], logits, retain_graph=True)
        assert_gates(grad, [expected, [0.0, 0.0], [0.0, 0.0]])
        # A dropped gate is the constant 0.
        (grad,) = torch.autograd.grad(gates[0, 1], logits, retain_graph=True)
        assert_gates(grad, [[0.0, 0.0]] * 3)
        # aux = 2 (f0 m0 + f1 m1), f = (1/3, 2/3): d aux / d z_t0 = 2/3 (1/3 - 2/3) p0 p1 = -0.16 / 3 for each token.
        (grad,) = torch.autograd.grad(aux[0], logits)
        assert_gates(grad, [[-0.16 / 3, 0.16 / 3]] * 3)


BASE = samples.TOP2_GATING.find("small", torch.float32, "all, groups, capacity, mask")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(24)}, "logits"),
        ({0: torch.zeros(24, 5, dtype=torch.int64)}, "logits"),
        ({0: torch.zeros(24, 0)}, "logits"),
        ({1: torch.ones(23, dtype=torch.bool)}, "token_mask"),
        ({1: torch.ones(24)}, "token_mask"),
        ({3: 7}, "group_size"),
        ({3: -2}, "group_size"),
        ({4: -2}, "capacity"),
        ({5: "none"}, "second_policy"),
        ({5: "random"}, "noise"),
        ({5: "random", 2: torch.zeros(24, 5)}, "noise"),
        ({5: "sampling"}, "noise"),
        ({5: "sampling", 2: torch.zeros(24)}, "noise"),
    ],
    ids=str,
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.TOP2_GATING, BASE, changes, text)
