"""Loads the compiled module, and turns what can go wrong into one sentence that says what to do.

A library compiled against one torch and loaded beside another fails, at best, with an undefined symbol. So the torch it
was compiled against is read from lib/build.json and compared before anything is loaded.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent
REBUILD = "reinstall with `pip install --no-build-isolation --force-reinstall --no-deps glam_ext` from its sources"


def minor(version: str) -> str:
    """2.13 of 2.13.0+cpu: the part of a torch version that fixes its C++ interface."""
    return ".".join(version.split(".")[:2])


def load() -> ModuleType:
    """Import glam_ext._C; raise ImportError with the remedy if torch or the core is missing or does not match."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ImportError(
            "glam_ext: expected torch to be installed, found none; install it with `pip install torch`"
        ) from None

    build_file = PACKAGE / "lib" / "build.json"
    if not build_file.exists():
        raise ImportError(
            f"glam_ext: expected the compiled core in {PACKAGE / 'lib'}, found none; "
            "run `make dev` in the source tree, or install the package"
        )
    built = json.loads(build_file.read_text())["torch"]
    if minor(built) != minor(torch.__version__):
        raise ImportError(
            f"glam_ext: expected torch {minor(built)}, against which it was compiled, got {torch.__version__}; "
            f"install torch=={minor(built)}.*, or {REBUILD}"
        )
    try:
        return importlib.import_module("glam_ext._C")
    except ImportError as error:
        raise ImportError(f"glam_ext: its compiled module does not load ({error}); {REBUILD}") from error
