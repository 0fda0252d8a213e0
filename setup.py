"""Drives CMakeLists.txt for pip, and pins the torch version that a built wheel needs.

Metadata, packages and extras are in pyproject.toml. This file adds what cannot be static: the C++ build, and the
dependencies, which in a built wheel name the exact minor version of torch it was compiled against, because torch's C++
interface changes from one to the next.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_FROM_SOURCE = "torch>=2.11"
NO_TORCH = (
    "glam_ext: expected an installed torch >= 2.11 to compile against, found none; run: "
    "pip install 'setuptools>=77' cmake ninja nlohmann-json torch && pip install --no-build-isolation ."
)
COMPILING_COMMANDS = {"build", "build_ext", "bdist_wheel", "dist_info", "editable_wheel", "install", "develop"}


def torch_requirement() -> str:
    """The requirement on torch: of the source in an sdist, of this very build everywhere else."""
    if not COMPILING_COMMANDS & set(sys.argv):
        return TORCH_FROM_SOURCE
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(NO_TORCH)
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 11):
        raise SystemExit(
            f"glam_ext: expected torch >= 2.11 to compile against, got {torch.__version__}; upgrade torch."
        )
    return f"torch=={major}.{minor}.*"


def find_program(name: str, remedy: str) -> str:
    """A program beside this Python (an environment need not be activated), else on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"glam_ext: expected the program {name} to build the C++ core, found none; {remedy}.")
    return found


def check_compiler() -> None:
    requested = os.environ.get("CXX")
    candidates = [requested.split()[-1]] if requested else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in candidates):
        raise SystemExit(
            f"glam_ext: expected a C++20 compiler ({', '.join(candidates)}), found none; install g++ >= 11 or "
            "clang++ >= 14, or name one in CXX."
        )


class CleanBuildPy(build_py):
    """Starts from an empty folder: setuptools would put modules of an earlier build, deleted since, into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Configures, compiles and installs the CMake project, into the wheel or, if editable, into the source tree."""

    def run(self) -> None:
        self.in_source = bool(self.inplace)  # setuptools clears `inplace` while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import torch

        check_compiler()
        cmake = find_program("cmake", "run: pip install cmake")
        ninja = find_program("ninja", "run: pip install ninja")
        torch_lib = Path(torch.__file__).parent / "lib"
        build_dir = ROOT / "build" / "cmake"
        configure = [
            *("-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # The default of a later `ninja -C build/cmake install`: the source tree.
            f"-DCMAKE_INSTALL_PREFIX={ROOT}",
            # In the source tree torch is not beside the package.
            f"-DGLAM_EXTRA_RPATH={torch_lib if self.in_source else ''}",
            *os.environ.get("GLAM_CMAKE_ARGS", "").split(),
        ]
        if self._configured_for_other(build_dir, torch_lib):
            configure.append("--fresh")
        prefix = ROOT if self.in_source else Path(self.get_ext_fullpath(ext.name)).resolve().parent.parent
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        try:
            subprocess.check_call([cmake, *configure])
            subprocess.check_call([cmake, "--build", str(build_dir), "--parallel", jobs])
            subprocess.check_call([cmake, "--install", str(build_dir), "--prefix", str(prefix)])
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"glam_ext: the C++ build failed (see above): {' '.join(error.cmd)}") from None

    @staticmethod
    def _configured_for_other(build_dir: Path, torch_lib: Path) -> bool:
        """Whether the build folder belongs to another Python or torch, whose cached paths would be reused silently."""
        stamp = build_dir / "configured_for.txt"
        # Not sys.executable: python and python3 of one environment are the same.
        wanted = f"{sys.prefix}\nPython {sys.version_info.major}.{sys.version_info.minor}\n{torch_lib}\n"
        stale = stamp.exists() and stamp.read_text() != wanted
        build_dir.mkdir(parents=True, exist_ok=True)
        stamp.write_text(wanted)
        return stale

    def copy_extensions_to_source(self) -> None:
        """An editable install has nothing to copy: CMake has installed into the source tree already."""


if int(setuptools.__version__.split(".")[0]) < 77:  # pip does not check this when the build is not isolated
    raise SystemExit(
        f"glam_ext: expected setuptools >= 77, got {setuptools.__version__}; run: pip install --upgrade setuptools"
    )

setup(
    ext_modules=[Extension("glam_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
    install_requires=[torch_requirement(), "numpy"],
)
