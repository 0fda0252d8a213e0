"""The loss convention: sums over the step divided by the step's own counts, whatever the micro-batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from glam_ext import GLaMConfig
from glam_ext.data import Batch, BatchSampler, TokenFolder
from glam_ext.model import GLaM
from glam_ext.training.step import accumulate_gradients, count_tokens, micro_batches

ROWS = 8


@pytest.fixture
def batch(data) -> Batch:
    """Rows of which some are padded, so that positions, real tokens and rows are three different counts."""
    folder = TokenFolder(data.train)
    batch = BatchSampler(folder, ROWS, seed=3).next_batch()
    weights, segment_ids = batch.weights.clone(), batch.segment_ids.clone()
    for row, real in ((0, 3), (3, 9), (6, 1)):
        weights[row, real:], segment_ids[row, real:] = 0, 0
    assert 0 < count_tokens(batch._replace(weights=weights)) < weights.numel()
    return batch._replace(weights=weights, segment_ids=segment_ids)


def model_in_float64(**fields: object) -> GLaM:
    config = dataclasses.replace(GLaMConfig.preset("tiny"), router_z_loss=0.01, z_loss=1e-3, **fields)
    return GLaM(config, seed=1).double().train()


def gradients(model: GLaM) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert all(grad is not None for grad in found.values())
    return found


@pytest.mark.parametrize("denominator", ["tokens", "positions"])
@pytest.mark.parametrize("capacity_factor", [0.0, 1.0], ids=["dropless", "capped"])
def test_micro_batches_give_the_gradient_of_one_batch(batch, denominator, capacity_factor):
    model = model_in_float64(capacity_factor=capacity_factor)
    whole_sums = accumulate_gradients(model, batch, ROWS, denominator=denominator)
    whole = gradients(model)
    for size in (1, 2, 4):
        sums = accumulate_gradients(model, batch, size, denominator=denominator)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")
        for field in ("total", "nll", "aux", "router_z"):
            torch.testing.assert_close(getattr(sums, field), getattr(whole_sums, field), rtol=1e-10, atol=0)
        assert torch.equal(sums.router_statistics, whole_sums.router_statistics)
    dropped = whole_sums.router_statistics[:, -6:-4].sum()
    assert (dropped > 0) == (capacity_factor > 0)


@pytest.mark.parametrize(("policy", "threshold"), [("random", 0.5), ("sampling", 0.0)])
def test_random_routing_does_not_depend_on_the_micro_batches(batch, policy, threshold):
    model = model_in_float64(second_policy=policy, second_threshold=threshold, router_jitter=0.01)
    whole = accumulate_gradients(model, batch, ROWS, seed=5, step=2)
    parts = accumulate_gradients(model, batch, 2, seed=5, step=2)
    assert torch.equal(parts.router_statistics, whole.router_statistics)
    torch.testing.assert_close(parts.nll, whole.nll, rtol=1e-10, atol=0)
    other_step = accumulate_gradients(model, batch, ROWS, seed=5, step=3)
    assert not torch.equal(other_step.router_statistics, whole.router_statistics)


def test_the_total_is_what_the_convention_says(batch):
    model = model_in_float64()
    config = model.config
    sums = accumulate_gradients(model, batch, 4)
    gradient = gradients(model)
    real = int(batch.weights.sum())
    parts = [model.loss(p.tokens, p.targets, p.weights.double(), p.segment_ids) for p in micro_batches(batch, 4)]
    total = sum(part.loss_sum for part in parts) / real
    total = total + config.aux_loss_weight * (parts[0].aux + parts[1].aux) / 2
    total = total + config.router_z_loss * sum(part.router_z for part in parts) / real
    total.backward()
    torch.testing.assert_close(sums.total, total.detach(), rtol=1e-12, atol=0)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(gradient[name], grad, rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(sums.nll, (torch.cat([p.nll for p in parts]) * batch.weights).sum().double())


def test_positions_as_the_denominator_count_padding_too(batch):
    model = model_in_float64(num_experts=0)
    accumulate_gradients(model, batch, ROWS, denominator="tokens")
    by_tokens = gradients(model)["layers.0.ffn.wo"]
    accumulate_gradients(model, batch, ROWS, denominator="positions")
    by_positions = gradients(model)["layers.0.ffn.wo"]
    share = float(batch.weights.sum()) / batch.weights.numel()
    torch.testing.assert_close(by_positions, by_tokens * share, rtol=1e-9, atol=1e-15)


def test_recompute_gives_the_same_gradient(batch):
    kept, recomputed = model_in_float64(), model_in_float64(recompute=True)
    accumulate_gradients(kept, batch, 4)
    accumulate_gradients(recomputed, batch, 4)
    expected = gradients(kept)
    for name, grad in gradients(recomputed).items():
        assert torch.equal(grad, expected[name]), name


def test_a_batch_of_padding_has_no_loss_and_no_nan(batch):
    model = model_in_float64()
    empty = batch._replace(weights=torch.zeros_like(batch.weights), segment_ids=torch.zeros_like(batch.segment_ids))
    sums = accumulate_gradients(model, empty, 4)
    assert sums.nll == 0
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@pytest.mark.parametrize("size", [3, 16, 0, -2])
def test_a_micro_batch_size_that_does_not_divide_the_rows_is_refused(batch, size):
    with pytest.raises(ValueError, match=rf"expected micro_batch_size to divide the number of rows, got {size} and 8"):
        accumulate_gradients(model_in_float64(), batch, size)
