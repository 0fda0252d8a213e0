"""accumulate_in_place: the gradients of experts' weights are added where they lie, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glam_ext import ops

from . import samples

Run = Callable[..., Tensor]
RELU, GEGLU = "three experts relu", "three experts geglu"


def expert_mlp(dtype: torch.dtype, name: str) -> tuple[Run, list[Tensor]]:
    rows, offsets, wi, wo, wg, activation = samples.EXPERT_MLP.find("small", dtype, name).args
    weights = [w.detach().clone().requires_grad_() for w in (wi, wo, wg) if w is not None]

    def run(wi: Tensor, wo: Tensor, wg: Tensor | None = None) -> Tensor:
        return ops.expert_mlp(rows, offsets, wi, wo, wg, activation)

    return run, weights


def exchange_mlp(dtype: torch.dtype, name: str) -> tuple[Run, list[Tensor]]:
    rows, offsets, wi, wo, wg, activation = samples.EXPERT_MLP.find("small", dtype, name).args
    weights = [w.detach().clone().requires_grad_() for w in (wi, wo, wg) if w is not None]
    sizes = offsets.diff()
    num_rows = int(offsets[-1])

    def run(wi: Tensor, wo: Tensor, wg: Tensor | None = None) -> Tensor:
        splits = sizes.tolist()  # of one rank, a chunk for each expert
        return ops.exchange_mlp(
            rows[:num_rows], offsets, wi, wo, wg, activation, splits, splits, group="", chunks=len(splits)
        )

    return run, weights


def moe_mlp(dtype: torch.dtype, name: str) -> tuple[Run, list[Tensor]]:
    _, _, wi, wo, wg, activation = samples.EXPERT_MLP.find("small", dtype, name).args
    weights = [w.detach().clone().requires_grad_() for w in (wi, wo, wg) if w is not None]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, wi.shape[1], generator=generator, dtype=torch.float64).to(dtype)
    gates, ids, positions, _ = ops.top2_gating(torch.randn(11, 3, generator=generator).double().to(dtype))
    plan = ops.routing_plan(ids, positions, 3)

    def run(wi: Tensor, wo: Tensor, wg: Tensor | None = None) -> Tensor:
        return ops.moe_mlp(x, gates, *plan, wi, wo, wg, activation)

    return run, weights


def passes(run: Run, weights: list[Tensor], in_place: bool) -> list[Tensor]:
    """Gradients after two backward passes."""
    for weight in weights:
        weight.grad = None
    for scale in (1.0, 0.5):
        loss = (run(*weights) * scale).square().sum()
        if in_place:
            with ops.accumulate_in_place():
                loss.backward()
        else:
            loss.backward()
    return [weight.grad for weight in weights if weight.grad is not None]


def ops_called(function: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages()}


CASES = [expert_mlp, exchange_mlp, moe_mlp]


@pytest.mark.parametrize("name", [RELU, GEGLU])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_same_gradients(case: Callable[..., tuple[Run, list[Tensor]]], dtype: torch.dtype, name: str) -> None:
    run, weights = case(dtype, name)
    wanted = [grad.clone() for grad in passes(run, weights, in_place=False)]
    got = passes(run, weights, in_place=True)
    assert len(got) == len(wanted) == (3 if name == GEGLU else 2)
    for a, b in zip(got, wanted, strict=True):
        if a.dtype == torch.bfloat16:  # the sum is rounded once instead of twice
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES)
def test_memory_stays_and_nothing_is_added_by_autograd(case: Callable[..., tuple[Run, list[Tensor]]]) -> None:
    run, weights = case(torch.float32, GEGLU)
    run(*weights).sum().backward()
    before = [weight.grad.data_ptr() for weight in weights if weight.grad is not None]
    held = [weight.grad for weight in weights]
    versions = [grad._version for grad in held if grad is not None]

    def again() -> None:
        with ops.accumulate_in_place():
            run(*weights).sum().backward()

    assert "aten::add_" not in ops_called(again)
    assert [weight.grad.data_ptr() for weight in weights if weight.grad is not None] == before
    for weight, old, version in zip(weights, held, versions, strict=True):
        assert weight.grad is not None
        assert old is not None
        assert torch.equal(weight.grad, old)  # who holds the gradient sees what is added, as with autograd's +=
        assert old._version > version


def refused(run: Run, weights: list[Tensor]) -> bool:
    """Whether autograd adds the gradients, in an ordinary second backward pass."""

    def again() -> None:
        with ops.accumulate_in_place():
            run(*weights).sum().backward()

    return "aten::add_" in ops_called(again)


def test_what_autograd_must_do_itself() -> None:
    def fresh() -> tuple[Run, list[Tensor]]:
        run, weights = expert_mlp(torch.float32, RELU)
        run(*weights).sum().backward()
        return run, weights

    run, weights = fresh()
    assert not refused(run, weights)

    run, weights = fresh()
    seen: list[Tensor] = []
    weights[0].register_hook(seen.append)  # sees the new part alone
    assert refused(run, weights)
    assert len(seen) == 1
    assert weights[0].grad is not None
    assert torch.equal(seen[0] * 2, weights[0].grad)

    run, weights = fresh()
    weights[1].grad = weights[1].grad.transpose(1, 2).contiguous().transpose(1, 2)  # type: ignore[union-attr]
    assert refused(run, weights)

    run, weights = fresh()
    weights[1].requires_grad_(False)  # its gradient from before stays
    kept = weights[1].grad.clone()  # type: ignore[union-attr]
    assert refused(run, weights)
    assert torch.equal(weights[1].grad, kept)  # type: ignore[arg-type]

    run, weights = fresh()
    assert refused(lambda *weights: run(*(weight * 1 for weight in weights)), weights)  # no leaves


def test_one_weight_twice() -> None:
    """Of one leaf in two roles, and of one that two calls use, no part is lost."""
    wi = torch.randn(2, 4, 4).requires_grad_()
    rows, offsets = torch.randn(6, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
    wo = torch.randn(2, 4, 4).requires_grad_()

    def run(wi: Tensor, wo: Tensor) -> Tensor:
        return ops.expert_mlp(ops.expert_mlp(rows, offsets, wi, wo, None, "relu"), offsets, wi, wi, None, "relu")

    wanted = [grad.clone() for grad in passes(run, [wi, wo], in_place=False)]
    for got, grad in zip(passes(run, [wi, wo], in_place=True), wanted, strict=True):
        torch.testing.assert_close(got, grad)


def test_autograd_grad_returns_the_new_part_and_leaves_grad_alone() -> None:
    run, weights = moe_mlp(torch.float32, RELU)
    run(*weights).sum().backward()
    before = [weight.grad.clone() for weight in weights if weight.grad is not None]
    with ops.accumulate_in_place():
        parts = torch.autograd.grad(run(*weights).sum(), weights)
        run(*weights).sum().backward(inputs=[weights[0]])
    for part, grad in zip(parts, before, strict=True):
        assert torch.equal(part, grad)
    assert torch.equal(weights[0].grad, before[0] * 2)  # type: ignore[arg-type]
    assert torch.equal(weights[1].grad, before[1])  # type: ignore[arg-type]


def test_hooks_after_accumulation_run() -> None:
    run, weights = moe_mlp(torch.float32, RELU)
    sums: list[Tensor] = []
    weights[0].register_post_accumulate_grad_hook(lambda weight: sums.append(weight.grad.clone()))
    passes(run, weights, in_place=True)
    assert len(sums) == 2
    assert not torch.equal(sums[0], sums[1])
    assert torch.equal(sums[1], weights[0].grad)  # type: ignore[arg-type]


def test_the_end_of_the_block_ends_it() -> None:
    run, weights = expert_mlp(torch.float32, RELU)
    run(*weights).sum().backward()
    with pytest.raises(KeyError), ops.accumulate_in_place():
        raise KeyError
    with ops.accumulate_in_place():
        with ops.accumulate_in_place():
            pass
        assert "aten::add_" not in ops_called(lambda: run(*weights).sum().backward())
    assert "aten::add_" in ops_called(lambda: run(*weights).sum().backward())


def test_into_is_checked_by_torch() -> None:
    glam = torch.ops.glam
    x, wi, wo = torch.randn(5, 4), torch.randn(3, 4, 6), torch.randn(3, 6, 4)
    gates, ids, positions, _ = ops.top2_gating(torch.randn(5, 3))
    plan = ops.routing_plan(ids, positions, 3)
    _, pre, pre_gate = glam._moe_mlp_forward(x, gates, *plan, wi, wo, None, "relu")
    arguments = (torch.randn(5, 4), x, gates, *plan, pre, pre_gate, wi, wo, None, "relu")
    for add in (False, True):
        into = [torch.zeros_like(wi), torch.zeros_like(wo), torch.empty(0)]
        torch.library.opcheck(glam._moe_mlp_backward_into.default, (*arguments, add, *into))


# --- a table that embedding and linear_cross_entropy share


def tied_loss(table: Tensor, output: Tensor | None = None) -> Tensor:
    ids = torch.tensor([3, 0, 3, 7, 39, 3])
    hidden = ops.embedding(ids, table).tanh()
    return ops.linear_cross_entropy(hidden, table if output is None else output, ids.flip(0))[0]


def table_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def backward_ops(loss: Tensor, in_place: bool) -> set[str]:
    if not in_place:
        return ops_called(loss.backward)
    with ops.accumulate_in_place():
        return ops_called(loss.backward)


SHARED, APART = "glam::_embedding_backward_into", "glam::_embedding_backward"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_shared_table_gets_one_gradient(dtype: torch.dtype) -> None:
    gradients = []
    for in_place in (False, True):
        table = table_of(dtype)
        for scale in (1.0, 0.3):  # the second pass adds to the first
            called = backward_ops(scale * tied_loss(table), in_place)
            assert (SHARED if in_place else APART) in called
            assert (APART in called) != in_place
        gradients.append(table.grad)
    assert torch.equal(*gradients)


def test_hooks_and_other_tables_are_left_alone() -> None:
    expected = table_of(torch.float32)
    tied_loss(expected).backward()
    hooked, seen = table_of(torch.float32), []
    hooked.register_hook(lambda grad: seen.append(grad.clone()))
    assert SHARED not in backward_ops(tied_loss(hooked), True)
    assert torch.equal(seen[0], expected.grad)
    first, second = table_of(torch.float32), table_of(torch.float32)
    assert SHARED not in backward_ops(tied_loss(first, second), True)
    assert torch.equal(first.grad + second.grad, expected.grad)


def test_a_gradient_that_somebody_holds_stays_as_it_is() -> None:
    table, held = table_of(torch.float32), []
    loss = tied_loss(table)
    loss.grad_fn.register_hook(lambda inputs, _: held.append(inputs[1]))
    assert SHARED not in backward_ops(loss, True)
    expected = table_of(torch.float32)
    tied_loss(expected).backward()
    assert torch.equal(table.grad, expected.grad)
    assert not torch.equal(held[0], table.grad)


def test_a_later_backward_pass_does_not_add_to_an_earlier_gradient() -> None:
    table, held = table_of(torch.float32), []
    table.register_post_accumulate_grad_hook(lambda x: held.append(x.grad))
    with ops.accumulate_in_place():
        ops.linear_cross_entropy(torch.ones(2, 8), table, torch.tensor([1, 2]))[0].backward()
        before = held[0].clone()
        table.grad = None
        ops.embedding(torch.tensor([4]), table).sum().backward()
    assert torch.equal(held[0], before)
    assert table.grad.sum() == 8
