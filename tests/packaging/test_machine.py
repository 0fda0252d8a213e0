"""What make and setup.py say on a machine that lacks something."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cmake" / "check_machine.sh"


def check(python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run([bash, SCRIPT, python], env=environment, capture_output=True, text=True)


def test_a_machine_without_compiler_and_python() -> None:
    result = check("python3", PATH="/nowhere")
    assert result.returncode == 1
    assert "python3 (Python 3.10 or newer)" in result.stderr
    assert "a C++20 compiler: g++ 11 or newer, or clang++ 14 or newer" in result.stderr


def test_a_compiler_without_cpp20(tmp_path: Path) -> None:
    compiler = tmp_path / "old-g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    result = check(sys.executable, PATH="/usr/bin:/bin", CXX=str(compiler))
    assert result.returncode == 1
    assert f"a C++20 compiler ({compiler} does not compile C++20; name another in CXX)" in result.stderr


def test_an_old_python(tmp_path: Path) -> None:
    python = tmp_path / "python3"
    python.write_text('#!/bin/sh\ncase "$2" in *version_info*) exit 1;; *python_version*) echo 3.8.1;; esac\n')
    python.chmod(0o755)
    result = check(str(python), PATH="/usr/bin:/bin")
    assert result.returncode == 1
    assert f"Python 3.10 or newer ({python} is 3.8.1)" in result.stderr


def setup_message(before: str) -> str:
    """What setup.py prints when asked for a wheel's metadata after `before` has changed the interpreter."""
    code = f"{before}; import runpy, sys; sys.argv = ['setup.py', 'dist_info']; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    return result.stderr.strip()


def test_setup_without_torch() -> None:
    assert setup_message("import sys; sys.modules['torch'] = None") == (
        "glam_ext: expected an installed torch >= 2.11 to compile against, found none; run: pip install "
        "'setuptools>=77' cmake ninja nlohmann-json torch && pip install --no-build-isolation ."
    )


def test_setup_with_an_old_torch() -> None:
    assert setup_message("import torch; torch.__version__ = '2.9.1'") == (
        "glam_ext: expected torch >= 2.11 to compile against, got 2.9.1; upgrade torch."
    )


def test_setup_with_old_setuptools() -> None:
    assert setup_message("import setuptools; setuptools.__version__ = '65.5.0'") == (
        "glam_ext: expected setuptools >= 77, got 65.5.0; run: pip install --upgrade setuptools"
    )
