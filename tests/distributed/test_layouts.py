"""Every layout of ranks trains as one process does: the same choices, loss, gradients, norm, weights and state."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch

from glam_ext.distributed import Mesh
from tests.guards import COLLECTIVE_SECONDS

from . import layouts
from .layouts import CASES, EXPERTS, Case, Outcome
from .processes import run_ranks

# (data, expert)
LAYOUTS = [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
EIGHT = [(4, 2), (1, 8)]
# float32 within rounding: five steps of Adafactor divide by the root of small second moments.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


@functools.cache
def one_process(name: str) -> Outcome:
    torch_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return layouts.whole_of([layouts.train(CASES[name], Mesh())])
    finally:
        torch.set_num_threads(torch_threads)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> functools._lru_cache_wrapper[dict[str, Outcome]]:
    @functools.cache
    def run(data: int, expert: int) -> dict[str, Outcome]:
        cases = [case for case in CASES.values() if EXPERTS // expert % case.chunks == 0 or expert == 1]
        if data * expert == 8:
            cases = [case for case in cases if case.name == "capped" or case.name == "dropless"]
        # In bfloat16 rows that travel are rounded on the way, which may turn a close choice: routed as one process did.
        given = {"bfloat16": one_process("bfloat16").logits}
        seen = run_ranks(tmp_path_factory.mktemp("ranks"), data * expert, layouts.run_cases, expert, cases, given)
        return {case.name: layouts.whole_of([rank[i] for rank in seen]) for i, case in enumerate(cases)}

    return run


@functools.cache
def in_float32() -> Outcome:
    """The case "bfloat16", routed alike, computed in float32."""
    case = CASES["bfloat16"]
    exact = dataclasses.replace(case, model={**case.model, "compute_dtype": "float32"})
    return layouts.whole_of([layouts.train(exact, Mesh(), one_process("bfloat16").logits)])


def check_bfloat16(actual: Outcome, expected: Outcome) -> None:
    """As far from float32 as one process is: what rounds in another place is no further off.

    One error is itself a draw, so each gradient is held against the worst of one process's layers.
    """
    for key, value in expected.sums[0].items():
        assert actual.sums[0][key] == pytest.approx(value, rel=5e-3)
    assert actual.norms == pytest.approx(expected.norms, rel=1e-2)
    truth = in_float32().gradients

    def kind(name: str) -> str:
        return re.sub(r"\d+", "N", name)

    usual: dict[str, float] = collections.defaultdict(float)
    for name, gradient in expected.gradients.items():
        usual[kind(name)] = max(usual[kind(name)], relative_error(gradient, truth[name]))
    for name, gradient in actual.gradients.items():
        error, worst = relative_error(gradient, truth[name]), usual[kind(name)]
        assert error <= 1.5 * worst + 1e-3, f"gradient {name}: relative error {error:.1e}, of one process {worst:.1e}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def check(name: str, actual: Outcome) -> None:
    case, expected = CASES[name], one_process(name)
    for layer, (ids, wanted) in enumerate(zip(actual.ids, expected.ids, strict=True)):
        assert torch.equal(ids, wanted), f"layer {layer}: other experts"
        assert torch.equal(actual.positions[layer], expected.positions[layer]), f"layer {layer}: other slots"
    assert torch.equal(actual.statistics, expected.statistics)
    if name == "bfloat16":
        check_bfloat16(actual, expected)
        return
    tolerance = TOLERANCE[case.dtype]
    for step, (sums, wanted_sums) in enumerate(zip(actual.sums, expected.sums, strict=True)):
        for key, value in sums.items():
            assert value == pytest.approx(wanted_sums[key], rel=tolerance), f"step {step}: {key}"
    assert actual.norms == pytest.approx(expected.norms, rel=tolerance)
    for kind in ("gradients", "weights", "state"):
        found, wanted_tensors = getattr(actual, kind), getattr(expected, kind)
        assert found.keys() == wanted_tensors.keys()
        for tensor_name, tensor in found.items():
            assert_close(tensor, wanted_tensors[tensor_name], tolerance, f"{kind} {tensor_name}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("data", "expert"), LAYOUTS, ids=lambda n: str(n))
def test_a_layout_trains_as_one_process(data: int, expert: int, name: str, outcomes) -> None:  # type: ignore[no-untyped-def]
    found = outcomes(data, expert)
    if name not in found:
        pytest.skip(f"{EXPERTS // expert} experts of a rank do not make {CASES[name].chunks} chunks")
    check(name, found[name])


@pytest.mark.parametrize("name", ["capped", "dropless"])
@pytest.mark.parametrize(("data", "expert"), EIGHT, ids=lambda n: str(n))
def test_eight_processes(data: int, expert: int, name: str, outcomes) -> None:  # type: ignore[no-untyped-def]
    found = outcomes(data, expert)
    if name not in found:
        pytest.skip(f"{EXPERTS // expert} experts of a rank do not make {CASES[name].chunks} chunks")
    check(name, found[name])


@pytest.mark.parametrize("name", CASES)
def test_the_cases_have_what_is_hard(name: str) -> None:
    case, outcome = CASES[name], one_process(name)
    rows_of_expert = outcome.statistics[:, :EXPERTS]
    assert (rows_of_expert[0, layouts.EMPTY_EXPERT] == 0).all()
    dropped_first, dropped_second = outcome.statistics[:, EXPERTS : EXPERTS + 2].unbind(1)
    if case.is_capped:
        assert (dropped_first > 0).all()
        assert (dropped_second > 0).all()
    real = [int(part.sum()) for part in layouts.global_batch(case, 0).weights.chunk(8)]
    assert len(set(real)) > 1
    assert real[-1] == 0
    weights = layouts.GLaM(case.config, seed=5).expert_parameters()
    for name_of_weight, weight in weights.items():
        for expert in range(1, EXPERTS):
            assert not torch.equal(weight[0], weight[expert]), name_of_weight


def test_all_tokens_to_one_rank(tmp_path: Path) -> None:
    run_ranks(tmp_path, 2, all_to_one_rank)


def all_to_one_rank() -> None:
    """Routers that choose experts 0 and 1 for every token: the second rank computes nothing and all is well."""
    from glam_ext.distributed import init_mesh

    mesh = init_mesh(expert=2, timeout=COLLECTIVE_SECONDS)
    for factor in (0.0, 2.0):
        case = Case("one rank", {"capacity_factor": factor})
        results = []
        for group in ("", mesh.group_name("expert")):
            model = layouts.GLaM(case.config, seed=5, expert_group=group).double()
            for name, parameter in model.named_parameters():
                if name.endswith("router"):
                    parameter.data.zero_()  # a tie: the lowest ids
            batch = layouts.global_batch(case, 0)
            part = slice(8 * mesh.rank, 8 * mesh.rank + 8)
            loss = model.loss(
                batch.tokens[part], batch.targets[part], batch.weights[part].double(), batch.segment_ids[part]
            )
            loss.loss_sum.backward()
            results.append((loss, {name: p.grad for name, p in model.named_parameters()}, model.local_experts))
        (alone, whole, _), (together, parts, mine) = results
        torch.testing.assert_close(together.loss_sum, alone.loss_sum, rtol=1e-12, atol=0)
        assert torch.equal(together.router_statistics, alone.router_statistics)
        assert int(together.router_statistics[0, 2:EXPERTS].sum()) == 0
        name = "layers.0.moe.wi"
        total = mesh.sum_(whole[name].clone())
        torch.testing.assert_close(parts[name], total[mine.start : mine.stop], rtol=1e-10, atol=1e-12)


def test_unequal_batches_are_refused_with_capacity(tmp_path: Path) -> None:
    run_ranks(tmp_path, 2, unequal_batches)


def unequal_batches() -> None:
    from glam_ext.distributed import init_mesh

    mesh = init_mesh(expert=2, timeout=60.0)
    tokens = torch.zeros(1 + mesh.rank, LENGTH, dtype=torch.long)
    dropless = layouts.GLaM(Case("", {"capacity_factor": 0.0}).config, expert_group=mesh.group_name("expert"))
    dropless(tokens)  # uneven splits: fine
    capped = layouts.GLaM(Case("").config, expert_group=mesh.group_name("expert"))
    with pytest.raises(RuntimeError, match="expected the same number of tokens, padding included, on every rank"):
        capped(tokens)


LENGTH = layouts.LENGTH
