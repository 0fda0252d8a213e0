"""Reordering a cache by beams: cache[b] <- old cache[beams[b]], in place."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from . import levels, samples


class TestReorderCache(levels.OpTests):
    op = samples.REORDER_CACHE
    levels_without: ClassVar = {"test_batch_invariance": "a row is a copy"}


def test_by_hand() -> None:
    cache = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    version = cache._version
    torch.ops.glam.reorder_cache_(cache, torch.tensor([2, 0, 0]))
    assert cache.tolist() == [[5, 6], [1, 2], [1, 2]]
    assert cache._version > version


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({1: torch.tensor([0, 1])}, "beams"),
        ({1: torch.tensor([0, 1, 3])}, "beams"),
        ({1: torch.tensor([0, -1, 2])}, "beams"),
        ({1: torch.tensor([0, 1, 2]).int()}, "beams"),
        ({0: torch.tensor(1.0)}, "cache"),
    ],
    ids=["too few", "too large", "negative", "int32", "scalar"],
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    sample = samples.REORDER_CACHE.find("small", torch.float32, "(3, 4, 2) [2, 0, 0]")
    levels.assert_refused(samples.REORDER_CACHE, sample, changes, text)
