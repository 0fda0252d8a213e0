"""The C++ examples, built outside the tree with the installed package's CMake files and no other help."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import glam_ext
from tests.guards import PROCESS_SECONDS
from tests.packaging.environments import ROOT, succeed


@dataclasses.dataclass(frozen=True)
class Program:
    """A built example, run with nothing of Python in its environment."""

    path: Path
    cmake_cache: str

    def start(self, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        clean = {"PATH": "/nowhere", **environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [self.path, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, env=clean, cwd="/"
        )

    def __call__(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return finish(self.start(*arguments, **environment))

    def assert_no_python(self, log: Path, *arguments: object) -> None:
        linked = succeed("ldd", self.path)
        assert "libglam_core.so" in linked
        assert not re.search(r"not found|libpython|libtorch_python", linked)
        # What is really loaded, by dlopen too: the dynamic linker's own account of the run.
        result = self(*arguments, LD_DEBUG="files", LD_DEBUG_OUTPUT=str(log))
        assert result.returncode == 0, result.stderr
        (account,) = log.parent.glob(f"{log.name}.*")
        files = set(re.findall(r"file=(\S+) \[0\];  generating link map", account.read_text()))
        assert any("libglam_core.so" in file for file in files)
        assert any("libtorch_cpu.so" in file for file in files)
        assert not [file for file in files if re.search(r"libpython|torch_python|_C\.", file)]


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        stdout, stderr = process.communicate(timeout=PROCESS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def build_example(source: str, target: str, folder: Path) -> Program:
    """examples/SOURCE, built in `folder`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "PATH": path}
    settings = [f"-DCMAKE_PREFIX_PATH={glam_ext.cmake_prefix_path}"]
    if shutil.which("ccache"):
        settings.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    succeed("cmake", "-G", "Ninja", "-S", ROOT / "examples" / source, "-B", folder, *settings, env=environment)
    succeed("cmake", "--build", folder, "--parallel", "2", env=environment)
    return Program(folder / target, (folder / "CMakeCache.txt").read_text())
