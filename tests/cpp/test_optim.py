"""glam::optim in a C++ program without Python against glam_ext.optim: the same bits."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

import glam_ext
from glam_ext import optim

PACKAGE = Path(glam_ext.__file__).parent


def pattern(*shape: int, seed: int) -> Tensor:
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 37 + seed * 11) % 64 - 31).float().div(16).reshape(shape)


def bits(tensor: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in tensor.detach().float().flatten().view(torch.int32).tolist()]


def train_in_python() -> list[tuple[str, list[int]]]:
    matrix, vector = pattern(6, 9, seed=1).requires_grad_(), pattern(5, seed=2).requires_grad_()
    optimizer = optim.Adafactor([matrix, vector], min_factored=4)
    lines = []
    for step in range(4):
        matrix.grad, vector.grad = pattern(6, 9, seed=3 + step), pattern(5, seed=4 + step)
        if step == 2:
            matrix.grad[1, 2] = torch.inf
        norm, nonfinite = optim.gradient_statistics([matrix, vector])
        lines.append(("norm", norm))
        optim.clip_gradients_([matrix, vector], norm, 2.0)
        optimizer.step(skip=nonfinite)
    state = optimizer.named_state([("matrix", matrix), ("vector", vector)])
    return [(name, bits(tensor)) for name, tensor in [*lines, ("matrix", matrix), ("vector", vector), *state.items()]]


@pytest.mark.slow
def test_the_same_bits_as_in_python(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    library, torch_library = PACKAGE / "lib", Path(torch.__file__).parent / "lib"
    program = tmp_path / "optim"
    command = [compiler, "-std=c++20", "-O0", str(Path(__file__).with_name("optim.cpp")), "-o", str(program)]
    command += [f"-isystem{path}" for path in include_paths()] + [f"-I{PACKAGE / 'include'}"]
    for folder in (library, torch_library):
        command += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    command += ["-Wl,--no-as-needed", "-lglam_core", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    output = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    found = [line.split(":") for line in output.splitlines()]
    lines = [(name, [int(word, 16) for word in words.split()]) for name, words in found]
    expected = train_in_python()
    assert lines == expected
    assert dict(expected)["step"] == bits(torch.tensor(3.0))  # the third of four steps was skipped
