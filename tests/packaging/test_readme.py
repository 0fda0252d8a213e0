"""The README's examples, run as they stand there. `make demo` and `make test` themselves are the two exceptions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import glam_ext

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language and "make demo" not in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that has what a checkout has: the recipes."""
    path = tmp_path_factory.mktemp("readme")
    (path / "recipes").symlink_to(ROOT / "recipes")
    return path


def run(command: list[str], folder: Path) -> str:
    """Its output; what the README calls `glam` is the one installed beside this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_readme_has_an_example_for_each_kind_of_user() -> None:
    assert len(blocks("python")) == 2
    assert len(blocks("sh")) == 2
    assert len(blocks("cpp")) == len(blocks("cmake")) == 1


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python(number: int, folder: Path) -> None:
    run([sys.executable, "-c", blocks("python")[number]], folder)


def test_commands_and_program(folder: Path) -> None:
    for script in blocks("sh"):
        run(["bash", "-euc", script], folder)
    assert (folder / "tiny.pt").stat().st_size > 0


@pytest.mark.slow
def test_cpp_program(folder: Path) -> None:
    if not (folder / "tiny.pt").exists():
        test_commands_and_program(folder)
    cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    source = folder / "program"
    source.mkdir()
    (source / "main.cpp").write_text(blocks("cpp")[0])
    (source / "CMakeLists.txt").write_text(blocks("cmake")[0])
    run([cmake, "-S", "program", "-B", "build", f"-DCMAKE_PREFIX_PATH={glam_ext.cmake_prefix_path}"], folder)
    run([cmake, "--build", "build"], folder)
    assert re.search(r"\d", run(["build/my_program"], folder))
