"""Attention over a cache: prefill in pieces, single steps, rows at different positions, finished rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestRelativeAttentionStep(levels.OpTests):
    op = samples.RELATIVE_ATTENTION_STEP


@levels.with_own_products
@pytest.mark.parametrize(
    "pieces", [[65], [1] * 65, [16, 1, 17, 31], [64, 1]], ids=["whole", "single", "mixed", "then one"]
)
@pytest.mark.parametrize("dtype", levels.DTYPES, ids=str)
def test_pieces_equal_the_whole_row(dtype: torch.dtype, pieces: list[int]) -> None:
    sample = samples.RELATIVE_ATTENTION.find("tiles", dtype, "(2, 65, 3, 17)")
    q, k, v, bias, _, extra, cap = sample.args
    whole = torch.ops.glam.relative_attention(q, k, v, bias, None, extra, cap)
    caches = [torch.full((2, 70, 3, 17), 9.0, dtype=dtype) for _ in range(2)]
    start = 0
    for piece in pieces:
        part = slice(start, start + piece)
        positions = torch.full((2,), start, dtype=torch.int32)
        y = torch.ops.glam.relative_attention_step(
            q[:, part], k[:, part], v[:, part], *caches, positions, bias, extra, cap
        )
        levels.assert_same_bits([y], [whole[:, part]], f"piece at {start}")
        start += piece
    assert torch.equal(caches[0][:, :65], k)
    assert torch.equal(caches[1][:, :65], v)
    assert (caches[0][:, 65:] == 9).all()


def test_a_finished_row_writes_nothing() -> None:
    sample = samples.RELATIVE_ATTENTION_STEP.find("small", torch.float32, "prefill, finished row")
    y, k_cache, v_cache = levels.run(samples.RELATIVE_ATTENTION_STEP, sample.args)
    assert (y[1] == 0).all()
    assert torch.equal(k_cache[1], sample.args[3][1])
    assert torch.equal(v_cache[1], sample.args[4][1])


def test_the_caches_versions_are_bumped() -> None:
    sample = samples.RELATIVE_ATTENTION_STEP.find("small", torch.float32, "one new")
    before = [sample.args[index]._version for index in (3, 4)]
    torch.ops.glam.relative_attention_step(*sample.args)
    assert all(sample.args[index]._version > old for index, old in zip((3, 4), before, strict=True))


def base() -> samples.Sample:
    return samples.RELATIVE_ATTENTION_STEP.find("small", torch.float32, "one new")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(3, 1, 12)}, "q"),
        ({1: torch.zeros(3, 2, 3, 4)}, "k"),
        ({2: torch.zeros(3, 1, 3, 5)}, "v"),
        ({3: torch.zeros(2, 9, 3, 4)}, "k_cache"),
        ({3: torch.zeros(3, 9, 3, 4, dtype=torch.float64)}, "k_cache"),
        ({4: torch.zeros(3, 8, 3, 4)}, "v_cache"),
        ({5: torch.zeros(3, dtype=torch.int64)}, "positions"),
        ({5: torch.zeros(2, dtype=torch.int32)}, "positions"),
        ({5: torch.tensor([4, 0, 9], dtype=torch.int32)}, "positions"),
        ({5: torch.tensor([4, 0, -2], dtype=torch.int32)}, "positions"),
        ({6: torch.zeros(3, 31)}, "bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.RELATIVE_ATTENTION_STEP, base(), changes, text)


def test_caches_in_the_same_memory_are_refused() -> None:
    q = torch.zeros(2, 1, 3, 4)
    cache = torch.zeros(2, 9, 3, 4)
    with pytest.raises(RuntimeError, match=r"glam::relative_attention_step: expected k_cache and v_cache to be apart"):
        torch.ops.glam.relative_attention_step(
            q, q, q, cache, cache, torch.zeros(2, dtype=torch.int32), torch.zeros(3, 32)
        )
