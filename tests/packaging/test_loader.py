"""Import errors: each names what is wrong and what to do about it, in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import glam_ext

PACKAGE = Path(glam_ext.__file__).parent

# Stands before the import: hides torch, or lets it claim another version.
HIDE_TORCH = "import sys; sys.modules['torch'] = None; "
OTHER_TORCH = "import torch; torch.__version__ = '2.99.1+cpu'; "


def import_error(before: str, package: Path) -> str:
    """The last line of what `import glam_ext` prints; `package` is the folder glam_ext to import."""
    code = before + f"import sys; sys.path.insert(0, {str(package.parent)!r}); import glam_ext"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def copy_without_core(folder: Path) -> Path:
    package = folder / "glam_ext"
    package.mkdir()
    for name in ("__init__.py", "_loader.py"):
        (package / name).write_text((PACKAGE / name).read_text())
    return package


def test_missing_torch() -> None:
    assert import_error(HIDE_TORCH, PACKAGE) == (
        "ImportError: glam_ext: expected torch to be installed, found none; install it with `pip install torch`"
    )


def test_other_torch_version() -> None:
    built = json.loads((PACKAGE / "lib" / "build.json").read_text())["torch_minor"]
    message = import_error(OTHER_TORCH, PACKAGE)
    assert f"expected torch {built}, against which it was compiled, got 2.99.1+cpu; install torch=={built}.*" in message


def test_missing_core(tmp_path: Path) -> None:
    message = import_error("", copy_without_core(tmp_path))
    assert f"expected the compiled core in {tmp_path / 'glam_ext' / 'lib'}, found none; run `make dev`" in message


def test_broken_core(tmp_path: Path) -> None:
    package = copy_without_core(tmp_path)
    (package / "lib").mkdir()
    (package / "lib" / "build.json").write_text((PACKAGE / "lib" / "build.json").read_text())
    (package / "_C.abi3.so").write_bytes(b"not a library")
    assert "its compiled module does not load" in import_error("", package)
