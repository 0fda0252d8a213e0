"""The two readers, Python's and C++'s: most tests of a folder ask both."""

from __future__ import annotations

import pytest

from tests.checkpoint.helpers import READERS, Reader


@pytest.fixture(params=list(READERS))
def read(request: pytest.FixtureRequest) -> Reader:
    return READERS[request.param]
