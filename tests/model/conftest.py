"""One thread for the model's tests: at their sizes several would mostly wait. Tests of threads set their own number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ops.levels import threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield
