"""Adafactor against the slow float64 reference and torch.optim.Adafactor; skipping, state, threads, shards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from glam_ext import optim
from glam_ext.distributed import init_mesh
from tests.distributed.processes import run_ranks
from tests.ops.levels import assert_same_bits, busy_threads, poisoned_memory, strided, threads
from tests.reference import adafactor as reference

SHAPES = [(7,), (1,), (5, 6), (130, 70), (3, 8, 5), (2, 3, 9, 17), (4, 32), (0, 5)]
MIN_FACTORED = 5


def parameter(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradient(weight: Tensor, step: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    rows = torch.logspace(-2, 1, max(weight.shape[0], 1), dtype=torch.float64)[: weight.shape[0]]
    values = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return (scale * values * rows.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)


def run_steps(optimizer: optim.Adafactor, weights: list[Tensor], steps: range) -> None:
    for step in steps:
        for weight in weights:
            weight.grad = gradient(weight, step)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = parameter(*shape, dtype=dtype)
    slow = reference.Adafactor(weight.detach(), MIN_FACTORED)
    optimizer = optim.Adafactor([weight], lambda step: 0.1 / (step + 1).double(), min_factored=MIN_FACTORED)
    for step in range(6):
        weight.grad = gradient(weight, step)
        optimizer.step()
        if weight.numel():
            slow.update(weight.grad, 0.1 / (step + 1))
    state = optimizer.state[weight]
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(weight.detach().double(), slow.weight, **tolerance)
    assert set(state) == ({"row_var", "col_var"} if slow.factored else {"variance"})
    assert slow.factored == reference.is_factored(shape, MIN_FACTORED)
    for key, value in state.items():
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), getattr(slow, key), **tolerance)
    assert optimizer.param_groups[0]["step"].item() == 6


def test_the_default_minimum_of_factored_dimensions_is_128() -> None:
    for shape, factored in [((128, 128), True), ((127, 512), False), ((512, 127), False), ((2, 128, 129), True)]:
        weight = parameter(*shape, dtype=torch.float32)
        optimizer = optim.Adafactor([weight])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert ("row_var" in optimizer.state[weight]) == factored, shape


def test_equals_torch_where_the_definitions_agree() -> None:
    """torch.optim.Adafactor factors every matrix and bounds the learning rate by 1 / sqrt(step), above 0.01 here."""
    for shape in [(9, 13), (3, 6, 7), (11,)]:
        ours, theirs = parameter(*shape), parameter(*shape)
        optimizer = optim.Adafactor([ours], 0.01, min_factored=1)
        other = torch.optim.Adafactor([theirs], 0.01, eps=(1e-30, 1e-3), weight_decay=0.0)
        for step in range(8):
            ours.grad = gradient(ours, step)
            theirs.grad = ours.grad.clone()
            optimizer.step()
            other.step()
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_update_by_hand() -> None:
    """First step: variance = grad^2, u = sign(grad), RMS(u) = 1, RMS(w) = 5: each weight moves by 0.01 * 5."""
    weight = torch.tensor([7.0, -1.0], dtype=torch.float64, requires_grad=True)
    weight.grad = torch.tensor([3.0, -1e-4], dtype=torch.float64)
    optim.Adafactor([weight]).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([6.95, -0.95], dtype=torch.float64), rtol=1e-14, atol=0)
    # A zero weight moves relative to 1e-3; a zero gradient moves nothing.
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.tensor([1.0, 0.0], dtype=torch.float64)
    optim.Adafactor([weight]).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-1e-5, 0.0], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-12, 1e6, 1e15])
def test_gradients_of_any_size_give_finite_steps(scale: float) -> None:
    weights = [parameter(6, 9, dtype=torch.float32), parameter(5, dtype=torch.float32)]
    optimizer = optim.Adafactor(weights, min_factored=2)
    for step in range(3):
        for weight in weights:
            weight.grad = gradient(weight, step, scale)
        optimizer.step()
    for weight in weights:
        assert weight.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[weight].values())


def test_a_skipped_step_changes_nothing() -> None:
    weights = [parameter(6, 9, dtype=torch.float32), parameter(5, dtype=torch.float32)]
    optimizer = optim.Adafactor(weights, min_factored=2)
    run_steps(optimizer, weights, range(2))
    before = copy.deepcopy([[w.detach() for w in weights], optimizer.state_dict()])
    for bad in (float("nan"), float("inf"), 1e30):  # the square of 1e30 is infinite
        weights[1].grad[2] = bad
        flag = optim.nonfinite_flag(weights)
        assert flag.item()
        optimizer.step(skip=flag)
    assert_same_bits(weights, before[0], "weights")
    after = optimizer.state_dict()
    assert after["param_groups"][0]["step"].item() == 2
    for index, state in before[1]["state"].items():
        assert_same_bits(list(after["state"][index].values()), list(state.values()), "state")
    # And a step that is not skipped equals one without the flag.
    twin_weights = [w.detach().clone().requires_grad_() for w in weights]
    twin = optim.Adafactor(twin_weights, min_factored=2)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run_steps(twin, twin_weights, range(2, 3))
    for weight in weights:
        weight.grad = gradient(weight, 2)
    optimizer.step(skip=optim.nonfinite_flag(weights))
    assert_same_bits(weights, twin_weights, "weights")


def test_state_round_trips_to_the_same_bits() -> None:
    def fresh() -> list[Tensor]:
        return [parameter(6, 9, dtype=torch.float32), parameter(5, dtype=torch.float32, seed=1)]

    names = ["matrix", "vector"]
    weights = fresh()
    optimizer = optim.Adafactor(weights, min_factored=2)
    run_steps(optimizer, weights, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    named = copy.deepcopy(optimizer.named_state(zip(names, weights, strict=True)))
    assert sorted(named) == ["matrix.col_var", "matrix.row_var", "step", "vector.variance"]
    middle = [w.detach().clone() for w in weights]
    run_steps(optimizer, weights, range(3, 5))
    for load in ("state_dict", "named_state"):
        resumed = [w.clone().requires_grad_() for w in middle]
        other = optim.Adafactor(resumed, min_factored=2)
        if load == "state_dict":
            other.load_state_dict(saved)
        else:
            other.load_named_state(zip(names, resumed, strict=True), named)
        run_steps(other, resumed, range(3, 5))
        assert_same_bits(resumed, weights, load)
    with pytest.raises(ValueError, match=r"expected vector.variance to be \[5\], got \[4\]"):
        other.load_named_state(zip(names, resumed, strict=True), {**named, "vector.variance": torch.zeros(4)})
    with pytest.raises(KeyError, match=r"bias\.variance belongs to no parameter"):
        other.load_named_state(zip(names, resumed, strict=True), {"bias.variance": torch.zeros(4)})


def test_a_state_with_missing_parts_is_refused_and_changes_nothing() -> None:
    weights = {"matrix": parameter(6, 9, dtype=torch.float32), "vector": parameter(5, dtype=torch.float32)}
    optimizer = optim.Adafactor(weights.values(), min_factored=2)
    run_steps(optimizer, list(weights.values()), range(2))
    named = optimizer.named_state(weights.items())
    before = copy.deepcopy(named)
    other_values = {name: tensor + 1 for name, tensor in named.items()}
    for missing, error, text in [
        ("matrix.col_var", ValueError, r"expected matrix\.col_var in the checkpoint beside row_var, got none"),
        ("matrix.row_var", ValueError, r"expected matrix\.row_var in the checkpoint beside col_var, got none"),
        ("step", KeyError, "the checkpoint has no step, the count of updates"),
    ]:
        tensors = {name: tensor for name, tensor in other_values.items() if name != missing}
        with pytest.raises(error, match=text):
            optimizer.load_named_state(weights.items(), tensors)
        assert_same_bits(list(optimizer.named_state(weights.items()).values()), list(before.values()), missing)
    # Without any entry a parameter never had a gradient when the checkpoint was saved.
    optimizer.load_named_state(weights.items(), {"vector.variance": torch.ones(5), "step": torch.tensor(1)})
    assert set(optimizer.named_state(weights.items())) == {"vector.variance", "step"}


def test_same_bits_for_any_number_of_threads() -> None:
    def run() -> list[Tensor]:
        weights = [parameter(3, 200, 170, dtype=torch.float32), parameter(90_001, dtype=torch.float32)]
        optimizer = optim.Adafactor(weights)
        run_steps(optimizer, weights, range(2))
        return [*(w.detach() for w in weights), *optim.gradient_statistics(weights), *optimizer.named_state(
            zip("ab", weights, strict=True)).values()]  # fmt: skip

    with threads(1):
        expected = run()
    for count in (2, 3, 7):
        with threads(count):
            assert_same_bits(run(), expected, f"{count} threads")
    with poisoned_memory():
        assert_same_bits(run(), expected, "poisoned memory")
    weight = parameter(3, 400, 300, dtype=torch.float32)
    weight.grad = gradient(weight, 0)
    optimizer = optim.Adafactor([weight])
    with threads(2):
        assert busy_threads(optimizer.step) > 1


def test_strided_weights_gradients_and_state() -> None:
    plain, gapped = parameter(6, 9), strided(parameter(6, 9).detach()).requires_grad_()
    for weight in (plain, gapped):
        weight.grad = gradient(plain, 0) if weight is plain else strided(gradient(plain, 0))
        optim.Adafactor([weight], min_factored=2).step()
    assert torch.equal(plain, gapped)


def test_versions_are_bumped() -> None:
    weight = parameter(5)
    weight.grad = torch.ones_like(weight)
    before = weight._version
    optim.Adafactor([weight]).step()
    assert weight._version > before


def test_refused_optimisers() -> None:
    with pytest.raises(ValueError, match=r"expected float32 or float64 parameters, got torch\.bfloat16"):
        optim.Adafactor([torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)])
    with pytest.raises(ValueError, match="expected lr >= 0"):
        optim.Adafactor([parameter(3)], lr=-1.0)
    with pytest.raises(ValueError, match="clipping > 0"):
        optim.Adafactor([parameter(3)], clipping=0.0)


def test_norm_and_clipping() -> None:
    weights = [parameter(3), parameter(2, 2), parameter(4)]
    weights[0].grad = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    weights[1].grad = torch.tensor([[0.0, 4.0], [0.0, 12.0]], dtype=torch.float64)
    norm, nonfinite = optim.gradient_statistics(weights)
    assert norm.item() == 13.0
    assert not nonfinite.item()
    assert optim.global_norm(weights).item() == 13.0
    optim.clip_gradients_(weights, norm, 20.0)
    assert optim.global_norm(weights).item() == 13.0
    optim.clip_gradients_(weights, norm, 6.5)
    assert optim.global_norm(weights).item() == 6.5
    assert weights[1].grad[1, 1].item() == 6.0
    tiny = torch.full((3,), 1e-30, requires_grad=True)
    tiny.grad = torch.full((3,), 1e-15)
    assert abs(optim.global_norm([tiny]).item() / (3**0.5 * 1e-15) - 1) < 1e-6


def test_schedules() -> None:
    assert optim.glam_schedule(0) == optim.glam_schedule(10_000) == 0.01
    assert optim.glam_schedule(40_000) == 0.005
    assert optim.glam_schedule(5, 3.0, 4) == 3.0 / 5**0.5
    for step in (0, 9_999, 10_001, 123_456):
        on_device = optim.glam_schedule(torch.tensor(step))
        assert on_device.dtype == torch.float64
        assert abs(on_device.item() / reference.learning_rate(step) - 1) < 1e-15
    cosine = [optim.cosine_schedule(t, 2.0, 12, 2, 0.1) for t in (0, 1, 2, 7, 12, 20)]
    assert cosine == pytest.approx([1.0, 2.0, 2.0, 1.1, 0.2, 0.2])
    assert [optim.inverse_sqrt_schedule(t, 2.0, 4) for t in (0, 3, 15)] == [0.5, 2.0, 1.0]


# A parameter over two ranks: along its batch, its rows, its columns, and unfactored.


SHARDED = [((4, 6, 8), -3), ((4, 6, 8), -2), ((4, 6, 8), -1), ((6, 3), -2), ((10,), -1)]


def sharded_weights() -> list[Tensor]:
    """What this rank holds of each after three steps."""
    mesh = init_mesh(expert=2)
    weights = []
    for shape, dim in SHARDED:
        whole = parameter(*shape)
        part = whole.detach().chunk(2, dim)[mesh.rank].clone().requires_grad_()
        shard = optim.Shard(dim, shape[dim], mesh.group_name("expert"))
        optimizer = optim.Adafactor([part], min_factored=4, shards={part: [shard]})
        for step in range(3):
            part.grad = gradient(whole, step).chunk(2, dim)[mesh.rank].clone()
            optimizer.step()
        weights.append(part.detach())
    return weights


def test_shards_equal_the_whole(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, 2, sharded_weights)
    for (shape, dim), *held in zip(SHARDED, *ranks, strict=True):
        whole = parameter(*shape)
        optimizer = optim.Adafactor([whole], min_factored=4)
        run_steps(optimizer, [whole], range(3))
        torch.testing.assert_close(torch.cat(held, dim), whole.detach(), rtol=1e-12, atol=1e-14)
