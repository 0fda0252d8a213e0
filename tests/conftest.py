"""What several folders of tests use, and what the tests run on: results that depend on threads or instruction sets are
worth little without them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import glam_ext

# The emulated CUDA kernels (csrc/cuda/emulator) take the place of the CPU's where this names their library.
if library := os.environ.get("GLAM_TEST_LIBRARY"):
    torch.ops.load_library(library)


def pytest_report_header() -> list[str]:
    info = glam_ext.build_info()
    cpu = info["backends"]["cpu"]
    return [
        f"glam_ext: {info['version']} from {os.path.dirname(glam_ext.__file__)}",
        f"torch: {info['torch_running']} (compiled against {info['torch_built']}), {torch.get_num_threads()} threads",
        f"instruction sets: {', '.join(cpu['isa_compiled'])} compiled, {cpu['isa_active']} in use",
    ]


class FailuresAtOnce:
    """Names a failure and its reason when it happens: the summary is for a run that reaches its end."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else report.longreprtext
            self.terminal.ensure_newline()
            self.terminal.write_line(f"{report.nodeid} failed in {report.when}: {reason}", red=True)


@pytest.hookimpl(trylast=True)  # once there is a terminal, which a worker process of pytest-xdist has not
def pytest_configure(config: pytest.Config) -> None:
    if terminal := config.pluginmanager.getplugin("terminalreporter"):
        config.pluginmanager.register(FailuresAtOnce(terminal))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for one mebibyte, where the system lets a test mount one."""
    disk = tmp_path / "small disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount program here")
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
