"""Slow: the package as a user gets it. A wheel in another environment, editable installs, a C++ program, bad machines.

Everything happens in a copy of the tracked files and in real environments.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.packaging.environments import EVERYTHING, Environment, copy_sources, succeed

pytestmark = pytest.mark.slow

TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Compiles the copy: once from nothing, since the build folder belongs to this environment."""
    return Environment(tmp_path_factory.mktemp("builder"), EVERYTHING)


@pytest.fixture(scope="module")
def wheel(builder: Environment, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    succeed(builder.python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, source)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("installed"), EVERYTHING)
    # --no-index: every requirement in the wheel's metadata is met by what is linked, or this fails.
    result = environment.pip_install("--no-index", wheel)
    assert result.returncode == 0, result.stdout + result.stderr
    return environment


def test_wheel_contents(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    wanted = {"lib/libglam_core.so", "lib/build.json", "include/glam/build_info.h", "share/cmake/glam/glamConfig.cmake"}
    wanted |= {"py.typed", "__main__.py"}
    wanted |= {
        str(path.relative_to(source)) for path in (source / "recipes").rglob("*.*") if path.suffix in (".py", ".toml")
    }
    wanted |= {str(path.relative_to(source / "glam_ext")) for path in (source / "glam_ext" / "data").rglob("*.xz")}
    assert not {f"glam_ext/{name}" for name in wanted} - names
    assert not [name for name in names if not re.match(r"glam_ext(-.*\.dist-info)?/", name)]
    assert f"Requires-Dist: torch=={TORCH_MINOR}.*" in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_wheel_has_no_path_of_the_building_machine(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    libraries = sorted(tmp_path.rglob("*.so"))
    assert len(libraries) == 2
    for library in libraries:
        for folder in re.search(r"R(?:UN)?PATH.*\[(.*)\]", succeed("readelf", "-d", library))[1].split(":"):  # type: ignore[index]
            assert folder.startswith("$ORIGIN")
    config = (tmp_path / "glam_ext/share/cmake/glam/glamConfig.cmake").read_text()
    assert 'GLAM_TORCH_HINT ""' in config


def test_installed_wheel_works(installed: Environment) -> None:
    assert installed.call("import glam_ext; print(glam_ext.__file__)").startswith(str(installed.site))
    assert "FAILED" not in succeed(installed.bin / "glam", "doctor", cwd="/")
    installed.call("import glam_ext.recipes")


def test_cmake_package_makes_a_program_without_python(installed: Environment, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(user LANGUAGES CXX)\nfind_package(glam REQUIRED)\n"
        "add_executable(user user.cpp)\ntarget_link_libraries(user PRIVATE glam::core)\n"
    )
    (tmp_path / "user.cpp").write_text(
        '#include "glam/build_info.h"\n#include <iostream>\nint main() {\n  const auto info = glam::build_info();\n'
        '  std::cout << info.version << " " << info.num_threads << " " << info.parallel_workers;\n}\n'
    )
    prefix = installed.call("import glam_ext; print(glam_ext.cmake_prefix_path)")
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    succeed("cmake", "-G", "Ninja", "-B", tmp_path / "b", "-S", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}", env=tools)
    succeed("cmake", "--build", tmp_path / "b", env=tools)
    version = installed.call("import glam_ext; print(glam_ext.__version__)")
    program = tmp_path / "b" / "user"
    threads = min(2, len(os.sched_getaffinity(0)))
    assert succeed(program, env={"OMP_NUM_THREADS": str(threads)}) == f"{version} {threads} {threads}"
    loaded = succeed("ldd", program)
    assert "libglam_core.so" in loaded
    assert not re.search(r"not found|libpython|libtorch_python", loaded)


def test_install_from_the_sources(builder: Environment, source: Path) -> None:
    """The README's command, where torch and the build tools are installed. PIP_NO_INDEX: nothing may be missing."""
    environment = {**os.environ, "PIP_NO_INDEX": "1"}
    succeed(builder.python, "-m", "pip", *["install", "--no-build-isolation", "."], env=environment, cwd=source)
    assert builder.call("import glam_ext; print(glam_ext.__file__)").startswith(str(builder.site))
    assert "FAILED" not in succeed(builder.bin / "glam", "doctor", cwd="/")
    builder.call("import glam_ext.recipes")
    assert "not found" not in succeed("ldd", builder.site / "glam_ext" / "lib" / "libglam_core.so")


def test_editable_install(builder: Environment, source: Path, wheel: Path) -> None:
    result = builder.pip_install("--no-index", "--no-build-isolation", "-e", source)
    assert result.returncode == 0, result.stdout + result.stderr
    assert builder.call("import glam_ext; print(glam_ext.__file__)") == str(source / "glam_ext" / "__init__.py")
    assert "FAILED" not in succeed(builder.bin / "glam", "doctor", cwd="/")
    builder.call("import glam_ext.recipes")
    # torch is not beside the package here, and a C++ program must still find it
    assert "not found" not in succeed("ldd", source / "glam_ext" / "lib" / "libglam_core.so")


def test_isolated_install_says_what_to_do(source: Path, tmp_path: Path) -> None:
    result = Environment(tmp_path / "venv").pip_install(source)
    output = result.stdout + result.stderr
    if "No matching distribution found for setuptools" in output:
        pytest.skip("pip finds no setuptools for an isolated build: no index is reachable")
    assert result.returncode != 0
    assert "Traceback" not in output
    assert "glam_ext: expected an installed torch >= 2.11 to compile against, found none; run: pip install" in output
    assert "pip install --no-build-isolation ." in output


def test_missing_compiler_says_what_to_do(source: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", EVERYTHING)
    result = environment.pip_install("--no-index", "--no-build-isolation", source, PATH=str(environment.bin), CXX="")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert "Traceback" not in output
    assert "glam_ext: expected a C++20 compiler (c++, g++, clang++), found none; install g++ >= 11" in output


def test_source_distribution(source: Path, tmp_path: Path) -> None:
    succeed(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "out")
    (tree,) = (tmp_path / "out").iterdir()
    assert "Requires-Dist: torch>=2.11" in (tree / "PKG-INFO").read_text()
    # recipes/ is the package glam_ext.recipes there
    for folder, packed in {"csrc": "csrc", "cmake": "cmake", "recipes": "glam_ext/recipes"}.items():
        for path in (source / folder).rglob("*.*"):
            name = Path(packed) / path.relative_to(source / folder)
            assert (tree / name).exists(), f"{name} is not in the source distribution"
