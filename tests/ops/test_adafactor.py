"""Adafactor's ops against the slow reference: lists of parameters, parameters split over ranks, skipped updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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
    col_var: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = self.weight.shape
        self.row_var = self.weight.new_zeros(shape[:-1] if self.factored else shape)
        self.col_var = self.weight.new_zeros((*shape[:-2], shape[-1]) if self.factored else (0,))

    @property
    def matrices(self) -> int:
        return math.prod(self.weight.shape[:-2]) if self.factored else 1

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, self.row_var, self.col_var]


def rate(lr: float) -> Tensor:
    return torch.tensor(lr, dtype=torch.float64)


def step_of_list(states: list[State], grads: list[Tensor], step: int, lr: float, skip: Tensor | None = None) -> None:
    """One update of whole parameters."""
    weights, row_vars, col_vars = (list(part) for part in zip(*(state.tensors for state in states), strict=True))
    shapes = [state.weight.shape[-2:] if state.factored else (1, 1) for state in states]
    row_sums, col_sums, weight_squares = OPS.adafactor_sums(grads, weights, [state.factored for state in states])
    row_means, scaled_squares = OPS.adafactor_stats_(
        row_vars, col_vars, grads, row_sums, col_sums, torch.tensor(step), skip, *zip(*shapes, strict=True)
    )
    update_squares = OPS.adafactor_update_squares(row_means, scaled_squares, [state.matrices for state in states])
    OPS.adafactor_apply_(
        weights, grads, row_vars, col_vars, row_means, weight_squares, update_squares, rate(lr), skip,
        [weight.numel() for weight in weights],
    )  # fmt: skip


def step_of_shards(grid: list[list[State]], grads: list[list[Tensor]], step: int, lr: float) -> None:
    """One update of a factored parameter cut into a grid of row and column parts, sums between the ops as their text
    says."""
    flat = [(i, j) for i in range(len(grid)) for j in range(len(grid[0]))]
    sums = {(i, j): OPS.adafactor_sums([grads[i][j]], [grid[i][j].weight], [True]) for i, j in flat}
    row_sums = {i: sum(sums[i, j][0] for j in range(len(grid[0]))) for i in range(len(grid))}
    col_sums = {j: sum(sums[i, j][1] for i in range(len(grid))) for j in range(len(grid[0]))}
    weight_squares = sum(sums[key][2] for key in flat)
    rows = sum(part[0].weight.shape[-2] for part in grid)
    columns = sum(state.weight.shape[-1] for state in grid[0])
    means, squares = {}, {}
    for i, j in flat:
        state = grid[i][j]
        means[i], squares[i, j] = OPS.adafactor_stats_(
            [state.row_var], [state.col_var], [grads[i][j]], row_sums[i], col_sums[j], torch.tensor(step), None,
            [rows], [columns],
        )  # fmt: skip
    row_means = sum(means.values())
    update_squares = OPS.adafactor_update_squares(row_means, sum(squares.values()), [grid[0][0].matrices])
    elements = sum(grads[i][j].numel() for i, j in flat)
    for i, j in flat:
        state = grid[i][j]
        OPS.adafactor_apply_(
            [state.weight], [grads[i][j]], [state.row_var], [state.col_var], row_means, weight_squares, update_squares,
            rate(lr), None, [elements],
        )  # fmt: skip


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_updates_equal_the_reference(dtype: torch.dtype) -> None:
    weights = [random(shape, seed, dtype) for seed, (shape, _) in enumerate(SHAPES)]
    slow = [
        adafactor.Adafactor(weight, min_factored=1 if factored else 10**6)
        for weight, (_, factored) in zip(weights, SHAPES, strict=True)
    ]
    states = [State(weight.clone(), factored) for weight, (_, factored) in zip(weights, SHAPES, strict=True)]
    for step in range(4):
        grads = [10.0 ** (step - 2) * random(shape, 10 * step + i, dtype) for i, (shape, _) in enumerate(SHAPES)]
        step_of_list(states, grads, step, 0.02)
        for parameter, grad in zip(slow, grads, strict=True):
            parameter.update(grad, 0.02)
    # The change is what the optimiser made; the weight itself would hide an error of one percent.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for weight, state, parameter in zip(weights, states, slow, strict=True):
        change, expected = state.weight.double() - weight.double(), parameter.weight - weight.double()
        assert (change - expected).norm() <= tolerance * expected.norm()
        ours = [state.row_var, state.col_var] if state.factored else [state.row_var]
        theirs = [parameter.row_var, parameter.col_var] if state.factored else [parameter.variance]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_list_is_updated_as_its_parameters_alone(dtype: torch.dtype) -> None:
    """More of them than one launch takes, with ones that have no elements among them."""
    shapes = [
        *SHAPES,
        ((0, 5), True),
        ((3, 0), True),
        ((0, 2, 4), True),
        ((0,), False),
        ((), False),
        ((4, 8), True),
    ] * 12
    together = [State(random(shape, seed, dtype), factored) for seed, (shape, factored) in enumerate(shapes)]
    alone = [State(state.weight.clone(), state.factored) for state in together]
    for step in range(2):
        grads = [random(shape, 1000 * step + seed, dtype) for seed, (shape, _) in enumerate(shapes)]
        step_of_list(together, grads, step, 0.02)
        for state, grad in zip(alone, grads, strict=True):
            step_of_list([state], [grad], step, 0.02)
    for a, b in zip(together, alone, strict=True):
        levels.assert_same_bits(a.tensors, b.tensors, str(a.weight.shape))
    # What has no elements keeps its state.
    assert all(not state.row_var.any() for state in together if state.weight.numel() == 0)


@pytest.mark.parametrize(("rows", "columns"), [((4, 2), (5,)), ((6,), (2, 3)), ((1, 5), (4, 1))], ids=str)
def test_a_split_parameter_is_updated_as_the_whole(rows: tuple[int, ...], columns: tuple[int, ...]) -> None:
    weight = random((3, 6, 5), 1, torch.float64)

    def cut(x: Tensor) -> list[list[Tensor]]:
        return [[part.contiguous() for part in strip.split(columns, 2)] for strip in x.split(rows, 1)]

    whole = State(weight.clone(), True)
    grid = [[State(part, True) for part in strip] for strip in cut(weight)]
    for step in range(3):
        grad = random((3, 6, 5), 20 + step, torch.float64)
        step_of_list([whole], [grad], step, 0.02)
        step_of_shards(grid, cut(grad), step, 0.02)
    joined = torch.cat([torch.cat([state.weight for state in strip], 2) for strip in grid], 1)
    assert (whole.weight - weight).norm() > 0
    torch.testing.assert_close(joined, whole.weight, rtol=1e-12, atol=1e-13)


def test_a_skipped_update_changes_nothing() -> None:
    states = [State(random(shape, 1, torch.float32), factored) for shape, factored in SHAPES]
    step_of_list(states, [random(shape, 2, torch.float32) for shape, _ in SHAPES], 0, 0.01, torch.tensor(False))
    before = [tensor.clone() for state in states for tensor in state.tensors]
    step_of_list(states, [torch.full(shape, math.nan) for shape, _ in SHAPES], 1, 0.01, torch.tensor(True))
    levels.assert_same_bits([tensor for state in states for tensor in state.tensors], before, "skipped")


def test_first_step_by_hand() -> None:
    # At step 0 the decay is 0: u = grad / |grad|, RMS(u) = 1, and the weight moves by 0.01 RMS(w) = 0.01 * 5.
    # A weight of zeros moves by 0.01 * 1e-3.
    for start, end in (([7.0, 1.0], [6.95, 1.05]), ([0.0, 0.0], [-1e-5, 1e-5])):
        state = State(torch.tensor(start, dtype=torch.float64), False)
        step_of_list([state], [torch.tensor([2.0, -3.0], dtype=torch.float64)], 0, 0.01)
        torch.testing.assert_close(state.weight, torch.tensor(end, dtype=torch.float64), rtol=1e-12, atol=0)


def updated(shapes: list[tuple[tuple[int, ...], bool]], make: Callable[[Tensor], Tensor] = torch.clone) -> list[Tensor]:
    """Weights and state after two updates of parameters, gradients and state that `make` made."""
    states = [State(make(random(shape, 1, torch.float32)), factored) for shape, factored in shapes]
    for state in states:
        state.row_var = make(state.row_var)
        if state.factored:
            state.col_var = make(state.col_var)
    for step in range(2):
        step_of_list(states, [make(random(shape, 2 + step, torch.float32)) for shape, _ in shapes], step, 0.01)
    return [tensor for state in states for tensor in state.tensors]


def test_bits_do_not_depend_on_strides_or_memory() -> None:
    expected = updated(SHAPES)
    levels.assert_same_bits(updated(SHAPES, levels.strided), expected, "strided")
    with levels.poisoned_memory():
        levels.assert_same_bits(updated(SHAPES), expected, "poisoned memory")


def test_bits_do_not_depend_on_threads() -> None:
    shapes = [((300, 500), True), ((150_000,), False), ((4, 130, 300), True), ((33,), False), ((7, 9), True)]
    with levels.threads(1):
        expected = updated(shapes)
    for count in (2, 3, 7):
        with levels.threads(count):
            levels.assert_same_bits(updated(shapes), expected, f"{count} threads")
    with levels.threads(2):
        assert levels.busy_threads(lambda: updated(shapes)) > 1


def arguments_of(name: str) -> tuple[object, ...]:
    """Of a call for three parameters."""
    shapes = [((4, 6, 5), True), ((7,), False), ((3, 2), True)]
    states = [State(random(shape, 1, torch.float32), factored) for shape, factored in shapes]
    grads = [random(shape, 2, torch.float32) for shape, _ in shapes]
    weights, row_vars, col_vars = (list(part) for part in zip(*(state.tensors for state in states), strict=True))
    sums = OPS.adafactor_sums(grads, weights, [state.factored for state in states])
    moments = (random((6,), 3, torch.float64).square(), random((6,), 4, torch.float64).square())
    squares = random((3,), 5, torch.float64).square()
    skip = torch.tensor(False)
    return {
        "adafactor_sums": (grads, weights, [state.factored for state in states]),
        "adafactor_stats_": (
            row_vars, col_vars, grads, sums[0], sums[1], torch.tensor(0), skip, [6, 1, 3], [5, 1, 2],
        ),
        "adafactor_update_squares": (*moments, [4, 1, 1]),
        "adafactor_apply_": (
            weights, grads, [x + 1 for x in row_vars], [x + 1 for x in col_vars], moments[0], squares, squares,
            rate(0.01), skip, [x.numel() for x in grads],
        ),
        "squared_norm": ([*grads, torch.ones(3).bfloat16(), torch.ones(2).double()],),
    }[name]  # fmt: skip


def flat(args: tuple[object, ...]) -> list[Tensor]:
    """All tensors among the arguments."""
    lists = [x if isinstance(x, list) else [x] for x in args]
    return [x for some in lists for x in some if isinstance(x, Tensor)]


NAMES = ["adafactor_sums", "adafactor_stats_", "adafactor_update_squares", "adafactor_apply_", "squared_norm"]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(OPS, name).default, arguments_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_compile_and_torchscript_equal_eager(name: str) -> None:
    expected_args = arguments_of(name)
    expected = [*levels.as_tuple(getattr(OPS, name)(*expected_args)), *flat(expected_args)]
    schema = getattr(OPS, name).default._schema.arguments[: len(expected_args)]
    signature = ", ".join(f"{x.name}: {x.type.annotation_str}" for x in schema)
    names = ", ".join(x.name for x in schema)
    script = torch.jit.CompilationUnit(f"def call({signature}):\n    return torch.ops.glam.{name}({names})\n").call
    compiled = torch.compile(getattr(OPS, name), fullgraph=True, backend="aot_eager")
    for what, call in (("TorchScript", script), ("torch.compile", compiled)):
        args = arguments_of(name)
        levels.assert_same_bits([*levels.as_tuple(call(*args)), *flat(args)], expected, what)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_squared_norm(dtype: torch.dtype) -> None:
    xs = [
        random((5, 1001), 3, dtype),
        random((40_000,), 4, dtype)[1:],
        random((3,), 5, torch.bfloat16),
        torch.zeros(0, 4),
    ]
    square_sums, nonfinite = OPS.squared_norm(xs)
    expected = torch.stack([x.double().square().sum() for x in xs])
    torch.testing.assert_close(square_sums, expected, rtol=1e-12, atol=0)
    assert not nonfinite.any()
    for bad in (math.nan, math.inf, -math.inf):
        broken = [x.clone() for x in xs]
        broken[0][3, 977] = bad
        assert OPS.squared_norm(broken)[1].tolist() == [True, False, False, False]
    # A square that overflows would make the statistics infinite for good, so it counts as non-finite.
    assert bool(OPS.squared_norm([torch.full((3,), 1e30, dtype=dtype)])[1]) == (dtype == torch.float32)
    many = [random((1 + seed,), seed, dtype) for seed in range(300)]
    alone = torch.cat([OPS.squared_norm([x])[0] for x in many])
    levels.assert_same_bits([OPS.squared_norm(many)[0]], [alone], "many")


def changed(name: str, index: int, value: object) -> tuple[object, ...]:
    args = list(arguments_of(name))
    args[index] = value
    return tuple(args)


ZEROS, FLAGS = [torch.zeros(3, 4), torch.zeros(2)], [True, False]
MIXED = [ZEROS[0], ZEROS[1].double()]


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("adafactor_sums", (ZEROS, [torch.zeros(3, 5), ZEROS[1]], FLAGS), r"grads\[0\] to be the shape of weights"),
        ("adafactor_sums", ([x.bfloat16() for x in ZEROS],) * 2 + (FLAGS,), r"weights\[0\] to be Float or Double"),
        ("adafactor_sums", (MIXED, MIXED, FLAGS), r"weights\[1\] to have the dtype of weights"),
        ("adafactor_sums", (MIXED, ZEROS, FLAGS), r"grads\[1\] to have the dtype of weights"),
        ("adafactor_sums", (ZEROS, ZEROS, [True, True]), r"weights\[1\] to be \[..., R, C\] to be factored, got 1"),
        ("adafactor_sums", (ZEROS, ZEROS, [True]), "factored to be of the length of weights, 2, got 1"),
        ("adafactor_sums", (ZEROS[:1], ZEROS, FLAGS), "grads to be of the length of weights, 2, got 1"),
        ("adafactor_sums", ([x.to("meta") for x in ZEROS], ZEROS, FLAGS), "all tensors on cpu, got meta"),
        ("adafactor_stats_", (0, [torch.zeros(4, 5), torch.zeros(7), ZEROS[0]]), r"row_vars\[0\] to be \[..., R\]"),
        ("adafactor_stats_", (1, [torch.zeros(4, 5), torch.zeros(7), ZEROS[1]]), r"col_vars\[1\] to be \[0\] beside"),
        ("adafactor_stats_", (3, torch.zeros(26)), r"row_sums to be \[sum of N R\] = \[27\]"),
        ("adafactor_stats_", (5, torch.zeros(1).long()), "step to be a scalar"),
        ("adafactor_stats_", (6, torch.tensor(0)), "skip to be Bool"),
        ("adafactor_stats_", (7, [6, 1]), "num_rows to be of the length of grads, 3, got 2"),
        ("adafactor_update_squares", (2, [4, 1]), r"row_means to be \[sum of num_matrices\] = \[5\]"),
        ("adafactor_update_squares", (2, [8, -1, -1]), "num_matrices of at least 0, got -1"),
        ("adafactor_apply_", (4, torch.zeros(5).double()), r"row_means to be \[sum of N\] = \[6\]"),
        ("adafactor_apply_", (5, torch.zeros(4).double()), r"weight_squares to be \[P\] = \[3\]"),
        ("adafactor_apply_", (7, torch.zeros(2)), "lr to be a scalar"),
        ("squared_norm", ([torch.zeros(3), torch.zeros(3, dtype=torch.int64)],), r"xs\[1\] to be"),
    ],
)  # fmt: skip
def test_bad_input(name: str, args: tuple[Any, ...], text: str) -> None:
    """Arguments, or the index of one and what it is replaced by."""
    with pytest.raises(RuntimeError, match=f"glam::{name}: expected {text}"):
        getattr(OPS, name)(*(changed(name, *args) if isinstance(args[0], int) else args))


@pytest.mark.parametrize(("name", "index"), [("adafactor_stats_", 1), ("adafactor_apply_", 0)])
def test_mutated_lists_bump_versions_and_refuse_gradients(name: str, index: int) -> None:
    args: Any = arguments_of(name)
    before = [tensor._version for tensor in args[index]]
    getattr(OPS, name)(*args)
    assert [tensor._version for tensor in args[index]] == [version + 1 for version in before]
    args[index][2].requires_grad_()
    with pytest.raises(RuntimeError, match=f"glam::{name}: expected .* not to require grad, or the call to be under"):
        getattr(OPS, name)(*args)
    with torch.no_grad():
        getattr(OPS, name)(*args)


@pytest.mark.parametrize("name", ["adafactor_sums", "squared_norm"])
def test_results_have_no_gradient(name: str) -> None:
    args: Any = arguments_of(name)
    args[0][0].requires_grad_()
    assert not any(output.requires_grad for output in getattr(OPS, name)(*args))
