"""RMSNorm: x * rsqrt(mean(x^2) + eps) * scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import levels, samples


class TestRmsNorm(levels.OpTests):
    op = samples.RMS_NORM


def test_by_hand() -> None:
    # mean((3, 4, 0, 0)^2) = 25 / 4, root 2.5: (1.2, 1.6, 0, 0), times the scale.
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.ops.glam.rms_norm(x, torch.tensor([1.0, 10.0, 1.0, 1.0], dtype=torch.float64), 0.0)
    torch.testing.assert_close(y, torch.tensor([[1.2, 16.0, 0.0, 0.0]], dtype=torch.float64))
    # eps is inside the root: 1 / sqrt(1 + 3) = 0.5. Its default is 1e-6.
    one = torch.ones(1, 1, dtype=torch.float64)
    assert torch.ops.glam.rms_norm(one, one[0], 3.0).item() == 0.5
    assert abs(torch.ops.glam.rms_norm(1e-3 * one, one[0]).item() - 0.5**0.5) < 1e-9


BASE = samples.RMS_NORM.find("small", torch.float32, "T=6 D=5")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({0: torch.zeros(6, 5, dtype=torch.int64)}, "x"),
        ({0: torch.tensor(1.0)}, "x"),
        ({0: torch.zeros(6, 4)}, "scale"),
        ({1: torch.zeros(5, 1)}, "scale"),
        ({1: torch.zeros(5, dtype=torch.float64)}, "scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(map(str, value)),
)
def test_bad_input(changes: dict[int, Any], text: str) -> None:
    levels.assert_refused(samples.RMS_NORM, BASE, changes, text)
