"""Router statistics: rows of each expert, choices over capacity, tokens by how many rows they have, real tokens."""

from __future__ import annotations

import torch

from tests.reference import gating

from . import samples


def test_by_hand() -> None:
    # Token 0: rows in experts 2 and 0. Token 1: first over capacity, second in expert 1. Token 2: first in expert 2,
    # second skipped. Token 3: masked. Token 4: both over capacity. Token 5: first in expert 0, second underflowed.
    ids = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 0], [1, 2], [0, 1]], dtype=torch.int32)
    positions = torch.tensor([[0, 0], [-2, 0], [1, -1], [-1, -1], [-2, -2], [1, -3]], dtype=torch.int32)
    statistics = torch.ops.glam.router_statistics(ids, positions, 3)
    assert statistics.dtype == torch.int64
    # Experts: 2, 1, 2 rows. Over capacity: 2 first, 1 second. Tokens with 0, 1, 2 rows: 1 (token 4), 3, 1. Real: 5.
    assert statistics.tolist() == [2, 1, 2, 2, 1, 1, 3, 1, 5]


def test_samples() -> None:
    for size in ("small", "tiles", "edges"):
        for sample in samples.TOP2_GATING.samples(size, torch.float32):
            _, ids, positions, _ = samples.TOP2_GATING(*sample.args)
            experts = sample.args[0].shape[1]
            statistics = torch.ops.glam.router_statistics(ids, positions, experts)
            kept = positions >= 0
            rows_of_token = kept.sum(1)[positions[:, 0] != gating.MASKED]
            expected = [
                *(int((ids[kept] == e).sum()) for e in range(experts)),
                *((positions == gating.OVER_CAPACITY).sum(0).tolist()),
                *(int((rows_of_token == count).sum()) for count in range(3)),
                len(rows_of_token),
            ]
            assert statistics.tolist() == expected, sample.name


def test_opcheck() -> None:
    ids = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.glam.router_statistics.default, (ids, torch.zeros_like(ids), 3))
