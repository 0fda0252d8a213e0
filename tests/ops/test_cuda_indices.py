"""What CUDA kernels make of indices out of range, which nobody can check before a launch without waiting for the
device: a marked result, the rest as it would be, and nothing outside the arrays."""

from __future__ import annotations

import pytest
import torch

from . import levels, samples
from .samples.routing import plan_of, routed

pytestmark = pytest.mark.skipif(not levels.CUDA_KERNELS, reason="the CPU kernels raise an error instead")

FAR = 2**31 - 1


def call(op: samples.Op, *args: object) -> tuple[torch.Tensor, ...]:
    return levels.as_tuple(op(*args))


def test_an_expert_out_of_range_gets_no_row() -> None:
    ids, positions = routed("plan", 40, 5)
    bad = torch.zeros_like(ids, dtype=torch.bool)
    bad[3, 0] = bad[17, 1] = bad[39, 0] = True
    strange = ids.masked_scatter(bad, torch.tensor([5, -1, FAR], dtype=torch.int32))
    for slots in (-1, 40):
        expected = call(samples.ROUTING_PLAN, ids, positions.masked_fill(bad, -1), 5, -1, slots)
        levels.assert_same_bits(
            call(samples.ROUTING_PLAN, strange, positions, 5, -1, slots), expected, f"slots {slots}"
        )


def test_a_position_beyond_the_slots_gets_no_row() -> None:
    ids, positions = routed("slotted", 12, 3, group=6, slots=2)
    expected = call(samples.ROUTING_PLAN, ids, positions, 3, 6, 2)
    over = positions.masked_fill(positions == -2, 2)
    over[over == -1] = FAR
    levels.assert_same_bits(call(samples.ROUTING_PLAN, ids, over, 3, 6, 2), expected, "plan")


def test_rows_and_choices_out_of_range_count_as_none() -> None:
    """Of a plan with strange entries dispatch, combine and moe_mlp make what they make of -1, gradients too."""
    tokens, experts = 9, 3
    row_of_choice, choice_of_row, offsets = plan_of("strange", tokens, experts)
    lost = row_of_choice[4, 0]
    none = (row_of_choice.clone(), choice_of_row.clone(), offsets)
    none[0][4, 0] = -1
    none[1][lost] = -1
    x = samples.DISPATCH.samples("small", torch.float32)[0].args[0].new_tensor(range(tokens * 4)).view(tokens, 4).sin()
    rows = torch.arange(2.0 * tokens * 4).view(2 * tokens, 4).cos()
    wi, wo = (
        torch.linspace(-1, 1, experts * 20).view(experts, 4, 5),
        torch.linspace(1, -2, experts * 20).view(experts, 5, 4),
    )

    def results(*plan: torch.Tensor) -> list[torch.Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x, rows, torch.full((tokens, 2), 0.5), wi, wo)]
        given, of_rows, gates, *weights = inputs
        outputs = [
            *call(samples.DISPATCH, given, *plan),
            *call(samples.COMBINE, of_rows, gates, *plan),
            *call(samples.MOE_MLP, given, gates, *plan, *weights, None, "gelu"),
        ]
        gradients = torch.autograd.grad(outputs, inputs, levels.cotangents(outputs))
        return [tensor.detach() for tensor in (*outputs, *gradients)]

    expected = results(*none)
    for strange in (2 * tokens, FAR, -7):
        plan = (none[0].clone(), none[1].clone(), offsets)
        plan[0][4, 0] = plan[1][lost] = strange
        levels.assert_same_bits(results(*plan), expected, f"{strange}")


@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
def test_a_token_outside_the_table_is_nan(dtype: torch.dtype) -> None:
    ids = torch.tensor([2, 5, 0, -1, 4, 2, 2**40])
    inside = (ids >= 0) & (ids < 5)
    table = torch.arange(15.0).view(5, 3).to(dtype).requires_grad_()
    (y,) = call(samples.EMBEDDING, ids, table)
    assert y[~inside].isnan().all()
    assert torch.equal(y[inside], table[ids[inside]])
    (gradient,) = torch.autograd.grad(y, table, torch.ones_like(y))
    assert torch.equal(gradient[:, 0].float(), torch.tensor([1.0, 0, 2, 0, 1]))


@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_target_outside_the_vocabulary_is_nan(dtype: torch.dtype, weight: float) -> None:
    """Its nll and gradient, unless its weight is 0; the other tokens are as they would be."""
    sample = samples.LINEAR_CROSS_ENTROPY.samples("small", dtype)[1]
    hidden, table, targets, weights, *options = levels.require_grad(sample)
    weights = torch.full_like(weights, 0.5)
    weights[3] = weight
    outputs, gradients = [], []
    for target in (1, table.shape[0], -1, 2**40):
        targets[3] = target
        loss, nll, lse = call(samples.LINEAR_CROSS_ENTROPY, hidden, table, targets, weights, *options)
        outputs.append((loss.detach(), nll, lse))
        gradients.append(torch.autograd.grad(loss, [hidden, table]))
    others = torch.arange(len(targets)) != 3
    for (loss, nll, lse), (of_hidden, of_table) in zip(outputs[1:], gradients[1:], strict=True):
        assert nll[3].isnan()
        levels.assert_same_bits([nll[others], lse], [outputs[0][1][others], outputs[0][2]], "nll and lse")
        levels.assert_same_bits([of_hidden[others]], [gradients[0][0][others]], "gradient of hidden")
        if weight:
            assert loss.isnan()
            assert of_hidden[3].isnan().all()
        else:
            levels.assert_same_bits([loss, of_hidden, of_table], [outputs[0][0], *gradients[0]], "padding")


@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
@pytest.mark.parametrize("width", [4, 8])
def test_a_position_without_room_is_nan_and_writes_nothing(dtype: torch.dtype, width: int) -> None:
    q, k, v = (torch.linspace(-1, 1, 3 * 2 * width).view(3, 2, 1, width).to(dtype) for _ in range(3))
    caches = [torch.full((3, 5, 1, width), 7.0, dtype=dtype) for _ in range(2)]
    bias = torch.zeros(1, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for bad in (4, 5, -2, FAR):
        positions = torch.tensor([1, bad, 0], dtype=torch.int32)
        args = (q, k, v, *caches, positions, bias, True, 0.0)
        y, *written = levels.run(samples.RELATIVE_ATTENTION_STEP, args)
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()
        assert all((cache[1] == 7).all() for cache in written)
        assert torch.equal(written[0][0, 1:3], k[0])


def test_a_beam_out_of_range_is_nan() -> None:
    cache = torch.arange(12.0).view(4, 3)
    (reordered,) = levels.run(samples.REORDER_CACHE, (cache, torch.tensor([2, 4, -1, 0])))
    assert reordered[1:3].isnan().all()
    assert torch.equal(reordered[[0, 3]], cache[[2, 0]])
