"""GLaM as a PyTorch extension: ops (torch.ops.glam.*), a LibTorch model, training and export."""

from __future__ import annotations

from pathlib import Path

from glam_ext._loader import load

_C = load()

from glam_ext.config import GLaMConfig, preset_names  # noqa: E402
from glam_ext.counts import ParameterCount, count_parameters  # noqa: E402
from glam_ext.doctor import build_info  # noqa: E402
from glam_ext.model import GLaM, Loss  # noqa: E402

__version__: str = _C.__version__

cmake_prefix_path: str = str(Path(__file__).parent / "share" / "cmake")
"""For CMake's find_package(glam): -DCMAKE_PREFIX_PATH of a C++ program."""

from glam_ext import functional, ops  # noqa: E402

__all__ = [
    "GLaM",
    "GLaMConfig",
    "Loss",
    "ParameterCount",
    "__version__",
    "build_info",
    "cmake_prefix_path",
    "count_parameters",
    "functional",
    "ops",
    "preset_names",
]
