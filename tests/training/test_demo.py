"""The demonstration as `make demo` runs it, from the text to the C++ program's continuation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

LIMIT_SECONDS = 15 * 60


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path):
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "glam_ext.recipes.demo", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads((out / "result.json").read_text())
    bits = result["bits_per_byte"]
    model = bits.pop("this model")
    assert set(bits) == {"xz -9e", "xz -9e after the training text", "Kneser-Ney 5-gram"}
    assert model < min(value for name, value in bits.items() if name.startswith("xz"))
    assert result["cpp_prints_the_same"] is True
    assert sum(result["seconds"].values()) < LIMIT_SECONDS
    records = [json.loads(line) for line in (out / "model" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["kind"] == "evaluation"
    assert records[-1]["bits_per_byte"] == pytest.approx(model, rel=1e-9)
    assert records[-1]["tokens"] >= 1_000_000
