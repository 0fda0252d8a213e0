"""Copies of the sources and virtual environments that need no network, to install and build the package as a user does.

torch and the other libraries are links to those of the running environment, so that nothing is downloaded and torch
lies beside the installed package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVERYTHING = r"(?!pip|_distutils_hack|distutils-precedence)"


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)  # type: ignore[call-overload]


def succeed(*command: str | Path, **options: object) -> str:
    result = run(*command, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


class Environment:
    """A virtual environment; `links` are the names of installed files to take over from the running one."""

    def __init__(self, folder: Path, links: str = "") -> None:
        succeed(sys.executable, "-m", "venv", folder)
        self.bin = folder / "bin"
        self.python = self.bin / "python"
        self.site = Path(succeed(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        if not links:
            return
        for entry in self.site.glob("setuptools*"):  # venv may have brought an older one
            shutil.rmtree(entry)
        for name in ("cmake", "ninja"):
            if (program := Path(sys.executable).parent / name).exists():
                (self.bin / name).symlink_to(program)
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            target = self.site / entry.name
            if re.match(links, entry.name) and "glam_ext" not in entry.name and not target.exists():
                target.symlink_to(entry)

    def pip_install(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(self.python, "-m", "pip", "install", *arguments, env={**os.environ, **environment}, cwd="/")

    def call(self, code: str) -> str:
        return succeed(self.python, "-c", code, cwd="/").strip()


def copy_sources(folder: Path) -> Path:
    """A copy of the tracked files in folder/glam_ext; beside these a working tree may hold anything."""
    tracked = run("git", "ls-files", "-z", cwd=ROOT)
    if tracked.returncode != 0:
        pytest.skip("the source tree is not a git checkout")
    copy = folder / "glam_ext"
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy
