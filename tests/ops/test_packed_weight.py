"""Weights packed for inference: every op that takes one against the plain weight that it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import glam_ext  # noqa: F401  (registers torch.ops.glam)

from . import levels

GLAM = torch.ops.glam
PACKED = {"bf16": torch.bfloat16, "int8": torch.int8}
EXPERTS, HIDDEN, WIDTH, VOCABULARY = 3, 96, 64, 160


def random(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 32), (34, 96), (3, 66, 32)], ids=str)
def test_bf16_holds_the_rounded_weight(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random(*shape, dtype=dtype)
    packed = GLAM.pack_weight(weight, torch.bfloat16)
    assert packed.shape == (*shape[:-2], shape[-1] // 32, shape[-2] // 2, 64)
    levels.assert_same_bits([GLAM.unpack_weight(packed)], [weight.bfloat16()], "unpacked")
    transposed = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    levels.assert_same_bits([GLAM.pack_weight(transposed, torch.bfloat16)], [packed], "of a transposed view")


def test_int8_is_within_half_a_step_of_each_column() -> None:
    weight = random(3, 66, 64) * torch.logspace(-3, 3, 64)
    packed = GLAM.pack_weight(weight, torch.int8)
    assert packed.shape == (3, 2, 70, 32)
    step = weight.abs().amax(-2, keepdim=True) / 127
    error = (GLAM.unpack_weight(packed) - weight).abs()
    assert (error <= 0.5001 * step).all()
    exact = torch.randint(-127, 128, (34, 32), generator=torch.Generator().manual_seed(1)).float()
    exact[0] = 127
    assert torch.equal(GLAM.unpack_weight(GLAM.pack_weight(exact, torch.int8)), exact)


def test_columns_of_zeros_and_nan() -> None:
    weight = random(4, 32)
    weight[:, 3] = 0
    weight[2, 5] = torch.nan
    weight[1, 7] = torch.inf
    found = GLAM.unpack_weight(GLAM.pack_weight(weight, torch.int8))
    assert (found[:, 3] == 0).all()
    assert found[:, 5].isnan().all()
    assert found[:, 7].isnan().all()
    assert found[:, [0, 1, 2, 4, 6]].isfinite().all()


def plan(tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gates, ids, positions, _ = GLAM.top2_gating(random(tokens, EXPERTS, seed=5), None, None, -1)
    return gates, *GLAM.routing_plan(ids, positions, EXPERTS)


def linear(x: Tensor, pack: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    return (GLAM.linear(x, pack(random(WIDTH, HIDDEN, seed=1))),)


def linear_wide(x: Tensor, pack: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    return (GLAM.linear_wide(x, pack(random(VOCABULARY, WIDTH, seed=1).t())),)


def moe(x: Tensor, pack: Callable[[Tensor], Tensor], activation: str = "relu") -> tuple[Tensor, ...]:
    wi, wg = (pack(random(EXPERTS, WIDTH, HIDDEN, seed=seed) / 8) for seed in (1, 2))
    wo = pack(random(EXPERTS, HIDDEN, WIDTH, seed=3) / 8)
    wg_or_none = wg if activation == "geglu" else None
    return (GLAM.moe_mlp(x, *plan(len(x)), wi, wo, wg_or_none, activation),)


def moe_geglu(x: Tensor, pack: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    return moe(x, pack, "geglu")


def experts(x: Tensor, pack: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    offsets = torch.tensor([0, len(x) // 3, len(x) // 3, len(x)], dtype=torch.int32)
    wi, wo = pack(random(EXPERTS, WIDTH, HIDDEN, seed=1) / 8), pack(random(EXPERTS, HIDDEN, WIDTH, seed=3) / 8)
    return (GLAM.expert_mlp(x, offsets, wi, wo, None, "gelu"),)


def geglu(x: Tensor, pack: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    w0, w1 = (pack(random(WIDTH, HIDDEN, seed=seed) / 8) for seed in (1, 2))
    return (GLAM.geglu_mlp(x, w0, w1, pack(random(HIDDEN, WIDTH, seed=3) / 8)),)


CALLS = [linear, linear_wide, moe, moe_geglu, experts, geglu]


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 7, 8, 9, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_bf16_has_the_bits_of_the_rounded_weight(call: Any, dtype: torch.dtype, tokens: int) -> None:
    x = random(tokens, WIDTH, dtype=dtype)
    packed = call(x, lambda weight: GLAM.pack_weight(weight, torch.bfloat16))
    levels.assert_same_bits(packed, call(x, lambda weight: weight.bfloat16()), "packed")


@pytest.mark.parametrize("tokens", [1, 8, 9, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_int8_against_float64(call: Any, dtype: torch.dtype, tokens: int) -> None:
    """The plain op in float64 with the weights that the integers stand for."""
    x = random(tokens, WIDTH, dtype=dtype)
    packed = call(x, lambda weight: GLAM.pack_weight(weight, torch.int8))

    def held(weight: Tensor) -> Tensor:
        return GLAM.unpack_weight(GLAM.pack_weight(weight, torch.int8)).double()

    if call in (moe, moe_geglu):
        gates, *rest = plan(tokens)
        wi, wg = (held(random(EXPERTS, WIDTH, HIDDEN, seed=seed) / 8) for seed in (1, 2))
        wo = held(random(EXPERTS, HIDDEN, WIDTH, seed=3) / 8)
        name = "geglu" if call is moe_geglu else "relu"
        expected = GLAM.moe_mlp(x.double(), gates.double(), *rest, wi, wo, wg if name == "geglu" else None, name)
    else:
        expected = call(x.double(), held)[0]
    levels.assert_close(packed[0], expected, levels.GRADIENT_TOLERANCE[dtype], call.__name__)


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_row_has_the_same_bits_alone_and_for_any_threads(call: Any, form: str) -> None:
    x = random(21, WIDTH, dtype=torch.bfloat16)

    def pack(weight: Tensor) -> Tensor:
        return GLAM.pack_weight(weight, PACKED[form])

    whole = call(x, pack)[0]
    for threads in (1, 3):
        with levels.threads(threads):
            assert levels.same_bits(call(x, pack)[0], whole)
    if call in (linear, linear_wide, geglu):
        for row in (0, 20):
            assert levels.same_bits(call(x[row : row + 1], pack)[0], whole[row : row + 1])


@pytest.mark.parametrize("form", PACKED)
def test_embedding_and_loss(form: str) -> None:
    table = random(VOCABULARY, WIDTH)
    packed = GLAM.pack_weight(table.t(), PACKED[form])
    held = GLAM.unpack_weight(packed).t().contiguous()
    ids = torch.tensor([[0, 31, 32], [159, 7, 100]])
    levels.assert_same_bits([GLAM.embedding(ids, packed)], [held[ids]], "rows")
    with pytest.raises(RuntimeError, match="glam::embedding: expected ids in"):
        GLAM.embedding(torch.tensor([VOCABULARY]), packed)
    hidden, targets = random(9, WIDTH, dtype=torch.bfloat16), torch.arange(9) * 17
    got = GLAM.linear_cross_entropy(hidden, packed, targets, None, 0.125)
    want = GLAM.linear_cross_entropy(hidden.double(), held.double(), targets, None, 0.125)
    for name, a, b in zip(("loss_sum", "nll", "lse"), got, want, strict=True):
        levels.assert_close(a, b, levels.VALUE_TOLERANCE[torch.float32], name)


@pytest.mark.parametrize("form", PACKED)
def test_traced_compiled_and_scripted(form: str) -> None:
    weight, dtype = random(WIDTH, HIDDEN), PACKED[form]
    packed = GLAM.pack_weight(weight, dtype)
    x = random(5, WIDTH, dtype=torch.bfloat16)
    torch.library.opcheck(GLAM.pack_weight.default, (weight, dtype))
    torch.library.opcheck(GLAM.unpack_weight.default, (packed,))
    torch.library.opcheck(GLAM.linear.default, (x, packed))
    w0, w1 = (GLAM.pack_weight(random(WIDTH, HIDDEN, seed=seed), dtype) for seed in (1, 2))
    wo = GLAM.pack_weight(random(HIDDEN, WIDTH, seed=3), dtype)
    dense = (x, w0, w1, wo)
    routed = (x, *plan(5), *(w.expand(EXPERTS, *w.shape).contiguous() for w in (w0, wo)), None, "gelu")
    for op, arguments in ((GLAM.geglu_mlp, dense), (GLAM.moe_mlp, routed)):
        compiled = torch.compile(lambda *args, op=op: op(*args), fullgraph=True, backend="aot_eager")
        levels.assert_same_bits([compiled(*arguments)], [op(*arguments)], "compiled")
    source = "def call(x: Tensor, w: Tensor) -> Tensor:\n    return torch.ops.glam.linear(x, w)\n"
    scripted = torch.jit.CompilationUnit(source).call
    levels.assert_same_bits([scripted(x, packed)], [GLAM.linear(x, packed)], "scripted")


def test_nothing_has_a_gradient() -> None:
    x = random(3, WIDTH).requires_grad_()
    packed = GLAM.pack_weight(random(WIDTH, HIDDEN).requires_grad_(), torch.bfloat16)
    assert not packed.requires_grad
    for call in CALLS:
        with pytest.raises(RuntimeError, match="expected no gradient to be wanted with packed weights"):
            call(x, lambda weight: GLAM.pack_weight(weight, torch.bfloat16))
    with torch.no_grad():
        assert GLAM.linear(x, packed).shape == (3, HIDDEN)


@pytest.mark.parametrize(
    ("weight", "dtype", "text"),
    [
        (torch.zeros(3, 32), torch.int8, "an even K"),
        (torch.zeros(4, 33), torch.int8, "a multiple of 32"),
        (torch.zeros(32), torch.int8, r"\[K, N\] or \[E, K, N\]"),
        (torch.zeros(2, 32, dtype=torch.float64), torch.int8, "Float or BFloat16"),
        (torch.zeros(2, 32), torch.float16, "dtype to be BFloat16 or Char"),
    ],
    ids=str,
)
def test_bad_weights(weight: Tensor, dtype: torch.dtype, text: str) -> None:
    with pytest.raises(RuntimeError, match=f"glam::pack_weight: expected .*{text}"):
        GLAM.pack_weight(weight, dtype)


def test_bad_packed_weights() -> None:
    x, packed = random(3, WIDTH), GLAM.pack_weight(random(WIDTH, HIDDEN), torch.int8)
    for x_, weight, text in (
        (random(3, WIDTH + 2), packed, "packed from"),
        (x.double(), packed, "got Double"),
        (x, packed.transpose(0, 1), "contiguous"),
        (x, packed[:, :, :30].contiguous(), "as pack_weight makes it"),
        (x, packed.float(), "BFloat16 or Char"),
    ):
        with pytest.raises(RuntimeError, match=f"glam::linear: expected .*{text}"):
            GLAM.linear(x_, weight)
    wi, wo = random(EXPERTS, WIDTH, HIDDEN), random(EXPERTS, HIDDEN, WIDTH)
    with pytest.raises(RuntimeError, match="glam::moe_mlp: expected all weights of the experts to be packed, or none"):
        GLAM.moe_mlp(x, *plan(3), GLAM.pack_weight(wi, torch.int8), wo, None, "relu")
