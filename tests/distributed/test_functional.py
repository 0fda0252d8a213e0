"""The readable form of the model with its experts over two ranks: the bits of the C++ tree, and one graph compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glam_ext import functional
from glam_ext.distributed import init_mesh
from tests.guards import COLLECTIVE_SECONDS

from . import layouts
from .processes import run_ranks

CAPACITY = {"capped": 1.0, "dropless": 0.0}


def loss_of(model: layouts.GLaM, options: functional.Options, batch: layouts.Batch) -> tuple[Tensor, Tensor]:
    weights = batch.weights
    parameters = dict(model.named_parameters())
    loss_sum, aux, *_ = functional.loss(
        batch.tokens, batch.targets, weights, batch.segment_ids, parameters, options, True, [11, 0, 0]
    )
    return loss_sum, aux


def both_forms(name: str, chunks: int, compiled: bool) -> dict[str, float]:
    mesh = init_mesh(expert=2, timeout=COLLECTIVE_SECONDS)
    case = layouts.Case(name, {"capacity_factor": CAPACITY[name]})
    group = mesh.group_name("expert")
    model = layouts.GLaM(case.config, seed=5, expert_group=group, exchange_chunks=chunks)
    options = functional.options_of(case.config, group, 2, chunks)
    part = slice(8 * mesh.rank, 8 * mesh.rank + 8)
    batch = layouts.Batch(*(tensor[part] for tensor in layouts.global_batch(case, 0)))
    call = loss_of
    if compiled:
        torch._dynamo.config.capture_scalar_outputs = True
        call = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    tree = model.loss(*batch, seed=11)
    (tree.loss_sum + tree.aux).backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    loss_sum, aux = call(model, options, batch)
    assert torch.equal(loss_sum, tree.loss_sum)
    assert torch.equal(aux, tree.aux)
    (loss_sum + aux).backward()
    for key, parameter in model.named_parameters():
        if compiled:  # a compiled graph may add gradients in another order
            torch.testing.assert_close(parameter.grad, wanted[key], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(parameter.grad, wanted[key]), key
    return {"loss": float(loss_sum)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("name", "chunks"), [("capped", 1), ("capped", 2), ("dropless", 1), ("dropless", 2)])
def test_functional_equals_the_tree(tmp_path: Path, name: str, chunks: int, compiled: bool) -> None:
    run_ranks(tmp_path, 2, both_forms, name, chunks, compiled)
