"""Prints what the tests run on: results that depend on threads or instruction sets are worth little without them."""

from __future__ import annotations

import os

import torch

import glam_ext


def pytest_report_header() -> list[str]:
    info = glam_ext.build_info()
    cpu = info["backends"]["cpu"]
    return [
        f"glam_ext: {info['version']} from {os.path.dirname(glam_ext.__file__)}",
        f"torch: {info['torch_running']} (compiled against {info['torch_built']}), {torch.get_num_threads()} threads",
        f"instruction sets: {', '.join(cpu['isa_compiled'])} compiled, {cpu['isa_active']} in use",
    ]
