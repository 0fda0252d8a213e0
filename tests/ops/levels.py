"""The levels every op passes, over the op's own samples (tests/ops/samples).

Values and gradients against the float64 reference; gradcheck; opcheck; torch.compile, torch.export and TorchScript; the
same bits for 1, 2, 3 and 7 threads, in a batch and alone, contiguous or not; every byte of the output written.
A test file makes a class of `OpTests` with `op` set; levels that cannot apply to it are left out by `levels_without`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import glam_ext  # noqa: F401  (registers torch.ops.glam)

from .samples import Op, Sample
from .samples.base import DEVICE, Args, Outputs, on_device

# The kernels under test are CUDA's: on a GPU, or emulated behind the CPU's key (csrc/cuda/emulator).
CUDA_KERNELS = DEVICE != "cpu" or "GLAM_TEST_LIBRARY" in os.environ
DTYPES = (torch.float64, torch.float32, torch.bfloat16, *((torch.float16,) if CUDA_KERNELS else ()))
LIBRARY_PRODUCT = "on CUDA its products are the library's, whose bits follow shapes and strides"
with_own_products = pytest.mark.skipif(CUDA_KERNELS, reason=LIBRARY_PRODUCT)
# Largest error of a row relative to that row's norm plus the rows' typical norm: a few roundings of the output and of
# each operand that enters a product, sums being kept in float32.
VALUE_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def as_tuple(outputs: Any) -> Outputs:
    return (outputs,) if isinstance(outputs, Tensor) else () if outputs is None else tuple(outputs)


def run(op: Op, args: Args, call: Callable[..., Any] | None = None) -> Outputs:
    """All outputs, then the mutated arguments; the caller's tensors stay as they are."""
    fresh = tuple(arg.clone() if index in op.mutated else arg for index, arg in enumerate(args))
    return as_tuple((call or op)(*fresh)) + tuple(fresh[index] for index in op.mutated)


def require_grad(sample: Sample) -> Args:
    return tuple(
        arg.detach().clone().requires_grad_() if index in sample.grad else arg for index, arg in enumerate(sample.args)
    )


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(17)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]


def gradients(op: Op, outputs: Outputs, args: Args, grad: Sequence[int], retain: bool = False) -> list[Tensor]:
    """d(sum of cotangent * output) / d(args), with cotangents rounded to the outputs' dtypes."""
    chosen = [outputs[index] for index in op.differentiable]
    wanted = [args[index] for index in grad]
    found = torch.autograd.grad(chosen, wanted, cotangents(chosen), retain_graph=retain, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def run_with_gradients(op: Op, sample: Sample, call: Callable[..., Any] | None = None) -> list[Tensor]:
    """Outputs, mutated arguments and, where the sample asks for them, gradients."""
    args = require_grad(sample)
    outputs = run(op, args, call)
    if not sample.grad or not op.differentiable:
        return list(outputs)
    return [out.detach() for out in outputs] + gradients(op, outputs, args, sample.grad)


def to_double(op: Op, args: Args) -> Args:
    """The arguments as the op sees them, in float64: weights rounded to the activations' dtype."""
    floating = {index: arg for index, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()}
    dtype = next(iter(floating.values())).dtype if floating else torch.float64
    return tuple(
        (arg.to(dtype) if index in op.weights else arg).double() if index in floating else arg
        for index, arg in enumerate(args)
    )


def row_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a row (last dimension) relative to its norm plus the root mean square of all rows' norms."""
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.double(), expected.double()
    if expected.dim() <= 1:
        actual, expected = actual.reshape(-1, 1), expected.reshape(-1, 1)
    error, size = (actual - expected).norm(dim=-1), expected.norm(dim=-1)
    typical = size.square().mean().sqrt()
    if typical == 0:
        return float(error.max())
    return float((error / (size + typical)).max())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), f"{what}: {actual} is not {expected}"
        return
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error = row_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} above {tolerance:.0e}"


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.equal(actual.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8))


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert same_bits(a.detach(), b.detach()), f"{what}: result {index} differs:\n{a}\n{b}"


def assert_refused(op: Op, sample: Sample, changes: dict[int, Any], text: str) -> None:
    """The sample with some arguments replaced raises `glam::op: expected ... text ...`."""
    args = list(sample.args)
    for index, value in changes.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=rf"glam::{op.name}: expected .*{text}"):
        op(*args)


# Levels: each takes an op and a sample.


def check_reference(op: Op, sample: Sample) -> None:
    outputs = run(op, sample.args)
    expected = op.reference(*to_double(op, sample.args))
    assert len(outputs) == len(expected)
    for index, (actual, wanted) in enumerate(zip(outputs, expected, strict=True)):
        tolerance = VALUE_TOLERANCE[actual.dtype] if actual.is_floating_point() else 0.0
        assert_close(actual, wanted, tolerance, f"output {index}")


def check_gradients(op: Op, sample: Sample, formula: Callable[..., Outputs] | None = None) -> None:
    """Gradients in the sample's dtype against the float64 reference at the same (rounded) inputs."""
    args = require_grad(sample)
    outputs = run(op, args)
    doubles = tuple(
        arg.detach().requires_grad_() if index in sample.grad else arg
        for index, arg in enumerate(to_double(op, sample.args))
    )
    expected_outputs = (formula or op.reference)(*doubles)
    chosen = [outputs[index] for index in op.differentiable]
    expected_chosen = [expected_outputs[index] for index in op.differentiable]
    given = cotangents(chosen)
    wanted = [args[index] for index in sample.grad]
    actual = torch.autograd.grad(chosen, wanted, given, allow_unused=True)
    attached = [(out, g.double()) for out, g in zip(expected_chosen, given, strict=True) if out.requires_grad]
    expected: Sequence[Tensor | None] = [None] * len(wanted)
    if attached:
        expected = torch.autograd.grad(
            [out for out, _ in attached],
            [doubles[index] for index in sample.grad],
            [g for _, g in attached],
            allow_unused=True,
        )
    # The coarsest operand sets the error, also that of a float32 weight's gradient.
    floating = [x for x in (*args, *chosen) if isinstance(x, Tensor) and x.is_floating_point()]
    tolerance = max(GRADIENT_TOLERANCE[x.dtype] for x in floating)
    for index, x, got, want in zip(sample.grad, wanted, actual, expected, strict=True):
        assert got is not None, f"argument {index} got no gradient"
        assert got.dtype == x.dtype
        want = torch.zeros_like(x, dtype=torch.float64) if want is None else want
        assert_close(got, want, tolerance, f"gradient of argument {index}")


def check_gradcheck(op: Op, sample: Sample) -> None:
    args = require_grad(sample)
    assert any(arg.dtype == torch.float64 for arg in args if isinstance(arg, Tensor))

    def function(*values: Tensor) -> Outputs:
        filled = list(args)
        for index, value in zip(sample.grad, values, strict=True):
            filled[index] = value
        outputs = run(op, tuple(filled))
        return tuple(outputs[index] for index in op.differentiable)

    with threads(1):  # thousands of tiny calls
        assert torch.autograd.gradcheck(function, tuple(args[index] for index in sample.grad))


def check_double_backward(op: Op, sample: Sample) -> None:
    """A second derivative is refused by name, never silently wrong or absent."""
    args = require_grad(sample)
    outputs = run(op, args)
    chosen = [outputs[index] for index in op.differentiable]
    wanted = [args[index] for index in sample.grad]
    given = [g.requires_grad_() for g in cotangents(chosen)]

    def twice() -> None:
        first = torch.autograd.grad(chosen, wanted, given, create_graph=True)
        torch.autograd.grad([g.sum() for g in first], [*wanted, *given], allow_unused=True)

    with pytest.raises(RuntimeError, match=r"glam::.*double backward"):
        twice()


def check_opcheck(op: Op, sample: Sample) -> None:
    # opcheck sends gradients to every floating output; where one refuses that, test_compile covers the backward.
    args = require_grad(sample) if op.differentiable and not op.refuses_gradients else sample.args
    torch.library.opcheck(getattr(torch.ops.glam, op.name).default, on_device(args))


def check_compile(op: Op, sample: Sample, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_same_bits(run_with_gradients(op, sample, compiled), run_with_gradients(op, sample), "compiled")


class _Caller(torch.nn.Module):
    """An op as a module of its tensor arguments, the others being constants."""

    def __init__(self, op: Op, args: Args) -> None:
        super().__init__()
        self.op = op
        self.constants = [None if isinstance(arg, Tensor) else (arg,) for arg in args]

    def forward(self, *tensors: Tensor) -> Any:
        remaining = iter(tensors)
        result = self.op(*(next(remaining) if c is None else c[0] for c in self.constants))
        return result if result is not None else tensors[0]


def check_export(op: Op, sample: Sample) -> None:
    tensors = tuple(arg.clone() for arg in sample.args if isinstance(arg, Tensor))
    program = torch.export.export(_Caller(op, sample.args), tensors)
    module = program.module()
    returns = getattr(torch.ops.glam, op.name).default._schema.returns

    def call(*args: Any) -> Any:
        result = module(*(arg for arg in args if isinstance(arg, Tensor)))
        return result if returns else None

    assert_same_bits(run(op, sample.args, call), run(op, sample.args), "exported")


def check_torchscript(op: Op, sample: Sample) -> None:
    """The op called from TorchScript source, with types from its schema."""
    schema = getattr(torch.ops.glam, op.name).default._schema
    parameters = ", ".join(f"{arg.name}: {arg.type}" for arg in schema.arguments)
    names = ", ".join(arg.name for arg in schema.arguments)
    source = f"def call({parameters}):\n    return torch.ops.glam.{op.name}({names})\n"
    scripted = torch.jit.CompilationUnit(source).call
    defaults = tuple(arg.default_value for arg in schema.arguments[len(sample.args) :])

    def call(*args: Any) -> Any:
        return op.on_device(scripted, *args, *defaults)

    assert_same_bits(run(op, sample.args, call), run(op, sample.args), "scripted")


def _activity_of_threads() -> dict[str, tuple[str, str]]:
    """Of each thread of this process the time on a CPU and how often it was put on one: a virtual machine whose host
    takes time away books a short run as no time at all, and a thread that never leaves its CPU is put on none.
    """
    activity = {}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError), open(f"/proc/self/task/{thread}/schedstat") as file:
            spent, _, runs = file.read().split()
            activity[thread] = spent, runs
    return activity


def busy_threads(work: Callable[[], Any]) -> int:
    """How many threads of this process used the CPU during `work`, waiting pools having come to rest before it."""
    work()
    before = _activity_of_threads()

    def active() -> tuple[int, dict[str, tuple[str, str]]]:
        time.sleep(0.02)  # a thread's time is booked at a tick or when it leaves the CPU, which a virtual one may delay
        now = _activity_of_threads()
        return sum(activity != before.get(thread) for thread, activity in now.items()), now

    for _ in range(50):
        count, before = active()
        if count <= 1:
            break
    work()
    deadline = time.monotonic() + 2.0
    while (count := active()[0]) <= 1 and time.monotonic() < deadline:
        pass
    return count


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def check_threads(op: Op, sample: Sample) -> None:
    with threads(1):
        expected = run_with_gradients(op, sample)
    for count in (2, 3, 7):
        with threads(count):
            assert_same_bits(run_with_gradients(op, sample), expected, f"{count} threads")
    with threads(2):
        assert busy_threads(lambda: run(op, sample.args)) > 1, "a single thread did all the work: enlarge the sample"
    if sample.grad and op.differentiable:
        args = require_grad(sample)
        outputs = run(op, args)
        with threads(2):
            work = functools.partial(gradients, op, outputs, args, sample.grad, retain=True)
            assert busy_threads(work) > 1, "a single thread did the whole backward: enlarge the sample"


def check_batch_invariance(op: Op, sample: Sample, rows: Sequence[int] = (0, 1, -1)) -> None:
    assert op.alone is not None
    assert op.row is not None
    batched = run(op, sample.args)
    count = sample.args[0].shape[0]
    if op.name == "combine":
        count = sample.args[1].shape[0]
    for index in sorted({row % count for row in rows} | {count // 2}):
        alone = run(op, op.alone(sample.args, index))
        outputs = alone[: len(alone) - len(op.mutated)]
        expected = op.row(batched[: len(batched) - len(op.mutated)], index)
        picked = op.row(outputs, 0)
        assert_same_bits(picked, expected, f"row {index}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that an op receives uninitialised holds NaN (the largest value in integers)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_poison(op: Op, sample: Sample) -> None:
    expected = run_with_gradients(op, sample)
    with poisoned_memory():
        poisoned = run_with_gradients(op, sample)
    assert_same_bits(poisoned, expected, "poisoned memory")


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between the elements and the dimensions stored in reverse order."""
    if tensor.dim() == 0:
        return tensor.clone()
    reverse = tuple(reversed(range(tensor.dim())))
    storage = tensor.new_zeros(*(2 * size for size in tensor.permute(reverse).shape))
    view = storage[tuple(slice(0, None, 2) for _ in range(tensor.dim()))].permute(reverse)
    view.copy_(tensor)
    return view


def check_strides(op: Op, sample: Sample) -> None:
    """Strided inputs and strided incoming gradients give the bits of contiguous ones."""
    expected = run_with_gradients(op, sample)
    args = tuple(
        strided(arg.detach()).requires_grad_(index in sample.grad)
        if isinstance(arg, Tensor) and index not in op.mutated
        else arg
        for index, arg in enumerate(sample.args)
    )
    outputs = run(op, args)
    actual = list(outputs)
    if sample.grad and op.differentiable:
        chosen = [outputs[index] for index in op.differentiable]
        wanted = [args[index] for index in sample.grad]
        given = [strided(g) for g in cotangents(chosen)]
        found = torch.autograd.grad(chosen, wanted, given, allow_unused=True)
        actual += [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    assert_same_bits(actual, expected, "strided")


class OpTests:
    """Subclass with `op`; pytest runs every level on the samples that suit it."""

    op: ClassVar[Op]
    formula: ClassVar[Callable[..., Outputs] | None] = None
    levels_without: ClassVar[dict[str, str]] = {}  # level -> why it cannot apply
    compiled_samples: ClassVar[int] = 2

    PLAN: ClassVar[dict[str, tuple[tuple[str, ...], tuple[torch.dtype, ...]]]] = {
        "test_reference": (("small", "tiles", "edges"), DTYPES),
        "test_gradients": (("small", "tiles", "edges"), DTYPES),
        "test_gradcheck": (("small",), (torch.float64,)),
        "test_double_backward": (("small",), (torch.float32,)),
        "test_opcheck": (("small",), (torch.float32, torch.bfloat16)),
        "test_compile": (("small",), (torch.float32,)),
        "test_export": (("small",), (torch.float32,)),
        "test_torchscript": (("small",), (torch.float32, torch.bfloat16)),
        "test_threads": (("large",), (torch.float32, torch.bfloat16)),
        "test_batch_invariance": (("small", "tiles", "large"), DTYPES),
        "test_poison": (("small", "edges"), (torch.float32, torch.bfloat16)),
        "test_strides": (("small", "edges"), (torch.float64, torch.float32, torch.bfloat16)),
    }

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        level = metafunc.function.__name__
        if level not in self.PLAN or "sample" not in metafunc.fixturenames:
            return
        sizes, dtypes = self.PLAN[level]
        if CUDA_KERNELS and self.op.has_cuda and level in ("test_reference", "test_gradients"):
            sizes = (*sizes, "cuda")
        cases = []
        for dtype in dtypes:
            for size in sizes:
                for sample in self.op.samples(size, dtype):
                    if level == "test_gradients" and not sample.grad:
                        continue
                    cases.append(pytest.param(sample, id=f"{str(dtype)[6:]}-{size}-{sample.name}"))
        without = dict(self.levels_without)
        if CUDA_KERNELS:
            without["test_threads"] = "the kernels run on the device"
            if self.op.library_product_on_cuda:
                for name in ("test_batch_invariance", "test_strides"):
                    without[name] = LIBRARY_PRODUCT
        if not self.op.differentiable:
            for name in ("test_gradients", "test_gradcheck", "test_double_backward"):
                without[name] = f"glam::{self.op.name} has no gradient"
        if level in without:
            cases = [pytest.param(None, id="none", marks=pytest.mark.skip(reason=without[level]))]
        if level == "test_double_backward":
            cases = cases[:1]
        if level == "test_opcheck":
            cases = [case for case in cases if "float32" in str(case.id)] + cases[-1:] if len(cases) > 1 else cases
        if level in ("test_compile", "test_export"):
            cases = cases[: self.compiled_samples]
        metafunc.parametrize("sample", cases)

    def test_reference(self, sample: Sample) -> None:
        check_reference(self.op, sample)

    def test_gradients(self, sample: Sample) -> None:
        check_gradients(self.op, sample, type(self).formula)

    def test_gradcheck(self, sample: Sample) -> None:
        check_gradcheck(self.op, sample)

    def test_double_backward(self, sample: Sample) -> None:
        check_double_backward(self.op, sample)

    def test_opcheck(self, sample: Sample) -> None:
        check_opcheck(self.op, sample)

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compile(self, sample: Sample, dynamic: bool) -> None:
        check_compile(self.op, sample, dynamic)

    def test_export(self, sample: Sample) -> None:
        check_export(self.op, sample)

    def test_torchscript(self, sample: Sample) -> None:
        check_torchscript(self.op, sample)

    def test_threads(self, sample: Sample) -> None:
        check_threads(self.op, sample)

    def test_batch_invariance(self, sample: Sample) -> None:
        check_batch_invariance(self.op, sample)

    def test_poison(self, sample: Sample) -> None:
        check_poison(self.op, sample)

    def test_strides(self, sample: Sample) -> None:
        check_strides(self.op, sample)
