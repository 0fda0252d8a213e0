"""The command `glam`: a door that lists what is there and imports nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glam_ext import __main__ as command
from glam_ext import doctor


def test_usage_lists_the_available_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["cook"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("glam: expected a command out of ")
    assert "doctor" in message
    assert message.endswith(", got cook\n")


@pytest.mark.parametrize("name", command.available())
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: glam {name}" in capsys.readouterr().out


def test_doctor_passes_here() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GLAM_CPU_ISA"}
    command_line = [sys.executable, "-m", "glam_ext", "doctor"]
    result = subprocess.run(command_line, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAILED" not in result.stdout
    assert result.stdout.count("ok ") == len(doctor.CHECKS)


def test_doctor_reports_a_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise RuntimeError("expected a working check")

    monkeypatch.setitem(doctor.CHECKS, "planted", broken)
    assert doctor.main([]) == 1
    assert "FAILED     planted: expected a working check" in capsys.readouterr().out
