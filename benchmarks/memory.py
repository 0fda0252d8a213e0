"""What a training step holds: bytes per token and layer from forward to backward, with and without recompute.

    python benchmarks/memory.py

D = 768, F = 3072, 12 heads of 64, E = 8 (dropless), 2 sequences of 1024 tokens. A layer is half the difference between
models of 4 and 2 layers; what is saved is counted by saved_tensors_hooks, each storage once, parameters
left out. `peak` is the process's largest growth during forward and backward of a model of 8 layers, V = 512, beside its
gradients.

formula  s = bytes of an activation: attention (2 D + 4 H A) s and 4 H for the log-sum-exp; feed-forward 2 D s, and a
         dense layer 2 F s, a mixture of experts 2 F s for two rows of a ReLU network; with recompute D s
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import subprocess
import sys

import torch
from common import PeakMemory, print_header
from torch import Tensor

from glam_ext import GLaM, GLaMConfig

B, S = 2, 1024
CONFIG = GLaMConfig(
    vocab_size=512, model_dim=768, hidden_dim=3072, num_layers=2, num_heads=12, head_dim=64, num_experts=8
)
FORMS = [(dtype, recompute) for dtype in ("bfloat16", "float32") for recompute in (False, True)]


def loss_of(model: GLaM) -> Tensor:
    tokens = torch.randint(4, CONFIG.vocab_size, (B, S + 1), generator=torch.Generator().manual_seed(0))
    loss = model.loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return loss.loss_sum + loss.aux


def saved_bytes(config: GLaMConfig) -> int:
    model = GLaM(config)
    kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = loss_of(model)
    total = sum(found.values())
    loss.backward()
    return total


def peak(config: GLaMConfig) -> None:
    loss_of(GLaM(dataclasses.replace(config, num_layers=2, model_dim=64, hidden_dim=64))).backward()
    model = GLaM(dataclasses.replace(config, num_layers=8))
    gc.collect()
    with PeakMemory() as memory:
        loss_of(model).backward()
    gradients = sum(parameter.nbytes for parameter in model.parameters())
    print((memory.peak - memory.before - gradients) / 1e6)


def main() -> None:
    known = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known.add_argument("--peak", type=int, metavar="I", help="only that of a form, in this process")
    arguments = known.parse_args()
    forms = [dataclasses.replace(CONFIG, compute_dtype=dtype, recompute=again) for dtype, again in FORMS]
    if arguments.peak is not None:
        peak(forms[arguments.peak])
        return
    print_header()
    for index, config in enumerate(forms):
        # One dense layer and one with experts more.
        layer = (saved_bytes(dataclasses.replace(config, num_layers=4)) - saved_bytes(config)) / 2 / (B * S)
        command = [sys.executable, __file__, "--peak", str(index)]
        grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        again = "recompute" if config.recompute else "saved"
        print(f"{config.compute_dtype:<9} {again:<10} {layer:7.0f} bytes per token and layer; peak {grown:.0f} MB")


if __name__ == "__main__":
    main()
