"""Every call that benchmarks/gpu.py times, at small sizes on the CPU: whoever has a GPU finds a script that runs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

import pytest
import torch

from .emulated import ROOT


def test_all_calls_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)

    def run_once(call: Callable[[], object]) -> float:
        call()
        return 1.0

    for timer in ("median_seconds", "eager_seconds"):
        monkeypatch.setattr(gpu, timer, run_once)
    monkeypatch.setattr(gpu, "COPIED", 1 << 10)
    monkeypatch.setattr(torch, "set_default_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    sizes = "--tokens 1024 --dim 32 --hidden 48 --experts 4 --vocabulary 64 --square 64"
    monkeypatch.setattr("sys.argv", ["gpu.py", *sizes.split()])
    gpu.main()
    lines = capsys.readouterr().out.splitlines()
    measured = {re.split(r" {2,}", line)[0] for line in lines if re.search(r"\d us ", line)}
    assert len(measured) > 30
    assert {"dispatch", "rms_norm backward", "adafactor_apply_", "relative_attention backward"} <= measured
