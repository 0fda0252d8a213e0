"""The README's examples and commands, run as they stand there, and its tables against the library.

Run elsewhere: `make demo` (tests/training/test_demo.py) and the installation (test_wheel.py); `make test` is this run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glam_ext
from glam_ext.counts import count_parameters

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)
PROSE = FENCE.sub("", README)
INLINE = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", PROSE)]
COMMANDS = sorted({text for text in INLINE if text.startswith("glam ")})


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language and "make demo" not in text]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that has what a checkout has: the recipes."""
    path = tmp_path_factory.mktemp("readme")
    (path / "recipes").symlink_to(ROOT / "recipes")
    return path


def table_rows(first_heading: str) -> list[list[str]]:
    """The cells of the table whose first column has this heading."""
    (table,) = re.findall(rf"^\| {first_heading} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


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


@pytest.mark.parametrize("command", COMMANDS)
def test_inline_commands(command: str, folder: Path) -> None:
    assert run(command.replace("NAME", "8B/64E").split(), folder).strip()


def test_the_prose_names_the_commands_that_are_tested() -> None:
    assert {"glam doctor", "glam inspect NAME", "glam train --help"} == set(COMMANDS)
    others = {text for text in INLINE if re.match(r"(pip|python\S*|make|cmake|bash) ", text)}
    assert others == {"pip install --no-build-isolation .", "make demo"}


def test_the_table_has_every_public_op() -> None:
    rows = table_rows("op")
    names = [name for cells in rows for name in re.findall(r"`(\w+)`", cells[0])]
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("glam::")}
    public = {name.removeprefix("glam::").split(".")[0] for name in registered if not name.startswith("glam::_")}
    assert sorted(names) == sorted(public)
    assert all(len(cells) == 2 and cells[1] for cells in rows)


def test_the_preset_table_is_what_the_presets_say() -> None:
    expected = []
    for name in glam_ext.preset_names():
        if name in ("tiny", "debug"):
            continue
        config = glam_ext.GLaMConfig.preset(name)
        sizes = (config.num_layers, config.model_dim, config.hidden_dim, config.num_heads, config.head_dim)
        row = [name, *map(str, sizes), str(config.num_experts) if config.num_experts > 1 else "-"]
        for vocab_size in (32_000, 256_000):
            count = count_parameters(glam_ext.GLaMConfig.preset(name, vocab_size=vocab_size))
            row += [f"{number / 1e9:.4g}" for number in (count.total, count.active)]
        expected.append(row)
    assert sorted(table_rows("preset")) == sorted(expected)


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
