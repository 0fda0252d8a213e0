"""Adafactor's three ops against the slow reference: whole parameters, parameters split over ranks, skipped updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.reference import adafactor

from . import levels

OPS = torch.ops.glam
SHAPES = [((7,), False), ((9, 5), True), ((3, 6, 5), True), ((2, 3, 4), False), ((33, 257), True), ((2, 129, 31), True)]


@dataclass
class State:
    """One rank's part of a parameter, `rows` and `columns` of which (in the last two dimensions) it holds."""

    weight: Tensor
    factored: bool
    row_var: Tensor = field(init=False)
    col_var: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        shape = self.weight.shape
        self.row_var = self.weight.new_zeros(shape[:-1] if self.factored else shape)
        self.col_var = self.weight.new_zeros((*shape[:-2], shape[-1])) if self.factored else None


def step_of_shards(
    grid: list[list[State]], grads: list[list[Tensor]], step: int, lr: float, skip: Tensor | None
) -> None:
    """One update of a parameter cut into a grid of row and column parts, sums between the ops as their text says."""
    factored = grid[0][0].factored
    count = torch.tensor(step)
    flat = [(i, j) for i in range(len(grid)) for j in range(len(grid[0]))]
    sums = {(i, j): OPS.adafactor_sums(grads[i][j], grid[i][j].weight, factored) for i, j in flat}
    row_sums = {i: sum(sums[i, j][0] for j in range(len(grid[0]))) for i in range(len(grid))}
    col_sums = {j: sum(sums[i, j][1] for i in range(len(grid))) for j in range(len(grid[0]))}
    weight_squares = sum(sums[key][2] for key in flat)
    rows = sum(part[0].weight.shape[-2] for part in grid) if factored else 1
    columns = sum(state.weight.shape[-1] for state in grid[0]) if factored else 1
    totals, squares = {}, {}
    for i, j in flat:
        state = grid[i][j]
        totals[i], squares[i, j] = OPS.adafactor_stats_(
            state.row_var, state.col_var, grads[i][j], row_sums[i], col_sums[j], count, skip, rows, columns
        )
    # Unfactored statistics have no rows to average; their total is 1 on every rank.
    row_means = sum(totals.values()) / rows if factored else totals[0]
    update_squares = (row_means * sum(squares.values())).sum()
    elements = sum(grads[i][j].numel() for i, j in flat)
    for i, j in flat:
        state = grid[i][j]
        OPS.adafactor_apply_(
            state.weight, grads[i][j], state.row_var, state.col_var, row_means, weight_squares, update_squares,
            torch.tensor(lr, dtype=torch.float64), skip, elements,
        )  # fmt: skip


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("shape", "factored"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_updates_equal_the_reference(shape: tuple[int, ...], factored: bool, dtype: torch.dtype) -> None:
    weight = random(shape, 1, dtype)
    slow = adafactor.Adafactor(weight, min_factored=1 if factored else 10**6)
    state = State(weight.clone(), factored)
    for step in range(4):
        grad = 10.0 ** (step - 2) * random(shape, 10 + step, dtype)
        slow.update(grad, 0.02)
        step_of_shards([[state]], [[grad]], step, 0.02, None)
    # The change is what the optimiser made; the weight itself would hide an error of one percent.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    change, expected = state.weight.double() - weight.double(), slow.weight - weight.double()
    assert (change - expected).norm() <= tolerance * expected.norm()
    ours = [state.row_var, state.col_var] if factored else [state.row_var]
    theirs = [slow.row_var, slow.col_var] if factored else [slow.variance]
    for a, b in zip(ours, theirs, strict=True):
        assert a is not None
        torch.testing.assert_close(a.double(), b, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize(("rows", "columns"), [((4, 2), (5,)), ((6,), (2, 3)), ((1, 5), (4, 1))], ids=str)
def test_a_split_parameter_is_updated_as_the_whole(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    weight = random((3, 6, 5), 1, torch.float64)

    def cut(x: Tensor) -> list[list[Tensor]]:
        return [[part.contiguous() for part in strip.split(columns, 2)] for strip in x.split(rows, 1)]

    whole = State(weight.clone(), True)
    grid = [[State(part, True) for part in strip] for strip in cut(weight)]
    for step in range(3):
        grad = random((3, 6, 5), 20 + step, torch.float64)
        step_of_shards([[whole]], [[grad]], step, 0.02, None)
        step_of_shards(grid, cut(grad), step, 0.02, None)
    joined = torch.cat([torch.cat([state.weight for state in strip], 2) for strip in grid], 1)
    assert (whole.weight - weight).norm() > 0
    torch.testing.assert_close(joined, whole.weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("shape", "factored"), SHAPES[:4], ids=str)
def test_a_skipped_update_changes_nothing(shape: tuple[int, ...], factored: bool) -> None:
    state = State(random(shape, 1, torch.float32), factored)
    step_of_shards([[state]], [[random(shape, 2, torch.float32)]], 0, 0.01, torch.tensor(False))
    before = [x.clone() for x in (state.weight, state.row_var, state.col_var) if x is not None]
    step_of_shards([[state]], [[torch.full(shape, math.nan)]], 1, 0.01, torch.tensor(True))
    after = [x for x in (state.weight, state.row_var, state.col_var) if x is not None]
    levels.assert_same_bits(after, before, "skipped")


def test_first_step_by_hand() -> None:
    # At step 0 the decay is 0: u = grad / |grad|, RMS(u) = 1, and the weight moves by 0.01 RMS(w) = 0.01 * 5.
    # A weight of zeros moves by 0.01 * 1e-3.
    for start, end in (([7.0, 1.0], [6.95, 1.05]), ([0.0, 0.0], [-1e-5, 1e-5])):
        state = State(torch.tensor(start, dtype=torch.float64), False)
        step_of_shards([[state]], [[torch.tensor([2.0, -3.0], dtype=torch.float64)]], 0, 0.01, None)
        torch.testing.assert_close(state.weight, torch.tensor(end, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("shape", "factored"), [((300, 500), True), ((150_000,), False), ((4, 130, 300), True)], ids=str
)
def test_bits_do_not_depend_on_threads_or_strides(shape: tuple[int, ...], factored: bool) -> None:
    def updated(make: object = torch.clone) -> list[Tensor]:
        assert callable(make)
        state = State(random(shape, 1, torch.float32), factored)
        for step in range(2):
            step_of_shards([[state]], [[make(random(shape, 2 + step, torch.float32))]], step, 0.01, None)
        return [x for x in (state.weight, state.row_var, state.col_var) if x is not None]

    with levels.threads(1):
        expected = updated()
    for count in (2, 3, 7):
        with levels.threads(count):
            levels.assert_same_bits(updated(), expected, f"{count} threads")
    levels.assert_same_bits(updated(levels.strided), expected, "strided gradient")
    with levels.poisoned_memory():
        levels.assert_same_bits(updated(), expected, "poisoned memory")
    with levels.threads(2):
        assert levels.busy_threads(updated) > 1


@pytest.mark.parametrize("factored", [True, False])
def test_opcheck(factored: bool) -> None:
    state = State(random((4, 6, 5), 1, torch.float32), factored)
    grad = random((4, 6, 5), 2, torch.float32)
    sums = OPS.adafactor_sums(grad, state.weight, factored)
    torch.library.opcheck(OPS.adafactor_sums.default, (grad, state.weight, factored))
    rows, columns = (6, 5) if factored else (1, 1)
    stats = (state.row_var, state.col_var, grad, sums[0], sums[1], torch.tensor(0), torch.tensor(False), rows, columns)
    torch.library.opcheck(OPS.adafactor_stats_.default, stats)
    totals, squares = OPS.adafactor_stats_(*stats)
    means = totals / rows
    apply = (
        state.weight, grad, state.row_var, state.col_var, means, sums[2], (means * squares).sum(),
        torch.tensor(0.01, dtype=torch.float64), torch.tensor(False), grad.numel(),
    )  # fmt: skip
    torch.library.opcheck(OPS.adafactor_apply_.default, apply)
    torch.library.opcheck(OPS.squared_norm.default, (grad,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_squared_norm(dtype: torch.dtype) -> None:
    x = random((5, 1001), 3, dtype)
    square_sum, nonfinite = OPS.squared_norm(x)
    torch.testing.assert_close(square_sum.double(), x.double().square().sum(), rtol=1e-12, atol=0)
    assert not bool(nonfinite)
    for bad in (math.nan, math.inf, -math.inf):
        broken = x.clone()
        broken[3, 977] = bad
        assert bool(OPS.squared_norm(broken)[1])
    # A square that overflows would make the statistics infinite for good, so it counts as non-finite.
    assert bool(OPS.squared_norm(torch.full((3,), 1e30, dtype=dtype))[1]) == (dtype == torch.float32)
    assert OPS.squared_norm(x[:0])[0] == 0


@pytest.mark.parametrize(
    ("op", "args", "text"),
    [
        ("adafactor_sums", (torch.zeros(3, 4), torch.zeros(3, 5), True), "grad|weight"),
        ("adafactor_sums", (torch.zeros(3, 4).bfloat16(), torch.zeros(3, 4).bfloat16(), True), "Float or Double"),
        ("adafactor_sums", (torch.zeros(3), torch.zeros(3), True), "grad|weight"),
        ("squared_norm", (torch.zeros(3, dtype=torch.int64),), "x"),
    ],
    ids=["shapes", "bfloat16", "a vector factored", "integers"],
)
def test_bad_input(op: str, args: tuple[object, ...], text: str) -> None:
    with pytest.raises(RuntimeError, match=rf"glam::{op}: expected .*({text})"):
        getattr(OPS, op)(*args)
