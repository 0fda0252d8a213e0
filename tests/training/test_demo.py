"""`make demo` in a fresh checkout: it builds, trains and ends in the C++ program's continuation, in the promised time.

The environment that make would create and fill from the network is there already, with links to what is installed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from tests.packaging.environments import EVERYTHING, Environment, copy_sources, run

LIMIT_SECONDS = 15 * 60  # the build included


@pytest.mark.slow
def test_make_demo_keeps_its_promises(tmp_path: Path) -> None:
    checkout = copy_sources(tmp_path)
    Environment(checkout / ".venv", EVERYTHING)
    environment = {**os.environ, "PIP_NO_INDEX": "1", "CCACHE_DISABLE": "1"}
    start = time.perf_counter()
    done = run("make", "demo", f"PYTHON={sys.executable}", cwd=checkout, env=environment)
    elapsed = time.perf_counter() - start
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert elapsed < LIMIT_SECONDS
    out = checkout / "runs" / "demo"
    result = json.loads((out / "result.json").read_text())
    stages = sum(result["seconds"].values())
    printed = re.search(
        r"^ *(\d+):(\d\d)  in all after the build; everything is in runs/demo$", done.stdout, re.MULTILINE
    )
    assert printed is not None, done.stdout[-2000:]
    assert int(printed[1]) * 60 + int(printed[2]) == pytest.approx(stages, abs=1)
    assert stages < elapsed
    bits = result["bits_per_byte"]
    model, packed = bits.pop("this model"), bits.pop("this model with int8 weights")
    assert packed == pytest.approx(model, abs=0.01)
    assert set(bits) == {"xz -9e", "xz -9e after the training text", "Kneser-Ney 5-gram"}
    assert model < min(value for name, value in bits.items() if name.startswith("xz"))
    assert result["cpp_prints_the_same"] is True
    assert "That is Python's output, character for character." in done.stdout
    records = [json.loads(line) for line in (out / "model" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["kind"] == "evaluation"
    assert records[-1]["bits_per_byte"] == pytest.approx(model, rel=1e-9)
    assert records[-1]["tokens"] >= 1_000_000
