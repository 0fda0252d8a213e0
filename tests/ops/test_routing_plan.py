"""The routing plan: every level, a golden plan of each form, and the properties that make it a plan."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from . import levels, samples


class TestRoutingPlan(levels.OpTests):
    op = samples.ROUTING_PLAN
    levels_without: ClassVar = {"test_batch_invariance": "every row of a plan depends on all tokens"}


# Three tokens, two experts. Token 0: experts 1 and 0; token 1: both dropped; token 2: expert 1, its second skipped.
IDS = torch.tensor([[1, 0], [0, 1], [1, 1]], dtype=torch.int32)
POSITIONS = torch.tensor([[0, 0], [-2, -3], [1, -1]], dtype=torch.int32)


def test_tight_plan_by_hand() -> None:
    # Rows by expert, then token: expert 0 has choice (0, 1); expert 1 has (0, 0) and (2, 0). A choice is t * 2 + k.
    row_of_choice, choice_of_row, offsets = torch.ops.glam.routing_plan(IDS, POSITIONS, 2)
    assert row_of_choice.tolist() == [[1, 0], [-1, -1], [2, -1]]
    assert choice_of_row.tolist() == [1, 0, 4, -1, -1, -1]
    assert offsets.tolist() == [0, 1, 3]
    assert {t.dtype for t in (row_of_choice, choice_of_row, offsets)} == {torch.int32}


def test_slotted_plan_by_hand() -> None:
    # One group, two slots per expert: row = expert * 2 + position. Row 1 (expert 0, slot 1) is empty.
    row_of_choice, choice_of_row, offsets = torch.ops.glam.routing_plan(IDS, POSITIONS, 2, -1, 2)
    assert row_of_choice.tolist() == [[2, 0], [-1, -1], [3, -1]]
    assert choice_of_row.tolist() == [1, -1, 0, 4]
    assert offsets.tolist() == [0, 2, 4]


def test_slotted_plan_of_two_groups_by_hand() -> None:
    # Row = (expert * 2 + group) * 1 + 0: expert 0 has rows 0, 1, expert 1 rows 2, 3.
    ids = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    row_of_choice, choice_of_row, offsets = torch.ops.glam.routing_plan(ids, torch.zeros_like(ids), 2, 1, 1)
    assert row_of_choice.tolist() == [[0, 2], [3, 1]]
    assert choice_of_row.tolist() == [0, 3, 1, 2]
    assert offsets.tolist() == [0, 2, 4]


def test_samples_drop_first_and_second_choices_and_leave_an_expert_empty() -> None:
    first = second = empty = 0
    for level in ("small", "tiles", "edges"):
        for sample in samples.ROUTING_PLAN.samples(level, torch.float32):
            ids, positions, experts, *_ = sample.args
            if ids.shape[0] > 3 and ids.shape[1] > 1:
                first += int((positions[:, 0] < 0).sum())
                second += int((positions[:, 1] < 0).sum())
                empty += experts > len(ids[positions >= 0].unique())
    assert min(first, second, empty) > 0


BASE = samples.ROUTING_PLAN.find("small", torch.float32, "slotted")
OUT_OF_RANGE = torch.full((12, 2), 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(12, 2)}, "expert_ids"),
        ({0: torch.zeros(12, 2, dtype=torch.int64)}, "expert_ids"),
        ({0: torch.zeros(12, dtype=torch.int32)}, "expert_ids"),
        ({0: OUT_OF_RANGE, 1: torch.zeros(12, 2, dtype=torch.int32)}, "expert_ids"),
        ({0: -OUT_OF_RANGE, 1: torch.zeros(12, 2, dtype=torch.int32)}, "expert_ids"),
        ({1: torch.zeros(11, 2, dtype=torch.int32)}, "positions"),
        ({1: torch.zeros(12, 2, dtype=torch.int64)}, "positions"),
        ({2: 0}, "num_experts"),
        ({3: 5}, "group_size"),
        ({4: -2}, "slots"),
        ({1: torch.full((12, 2), 2, dtype=torch.int32)}, "positions"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.ROUTING_PLAN, BASE, changes, text)
