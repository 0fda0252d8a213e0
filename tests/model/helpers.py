"""What the model's tests share: small configurations, batches with padding and two segments in a row, comparisons."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glam_ext import GLaM, GLaMConfig, Loss
from tests.ops.levels import same_bits

# Between them every branch of the wiring; capacity factor 1 so that tokens are dropped.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"capacity_factor": 1.0},
    "geglu, untied, caps": {
        "expert_activation": "geglu",
        "tie_embedding": False,
        "attention_logit_cap": 5.0,
        "logit_cap": 8.0,
        "router_logit_cap": 6.0,
        "label_smoothing": 0.1,
        "aux_loss_reduction": "mean",
        "capacity_factor": 1.0,
    },
    "gelu in the odd layers, random": {
        "expert_activation": "gelu",
        "moe_first": False,
        "second_policy": "random",
        "second_threshold": 0.5,
        "router_jitter": 0.1,
        "attention_extra_logit": False,
        "group_size": -1,
        "capacity_factor": 1.0,
    },
    "dense": {"num_experts": 0},
}
COUNTERS = {"seed": 3, "step": 2, "first_token": 64}


def config_of(variant: str = "default", **fields: Any) -> GLaMConfig:
    return GLaMConfig.preset("tiny", **{**VARIANTS[variant], **fields})


def build(config: GLaMConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> GLaM:
    return GLaM(config, seed=seed).to(dtype)


def batch_of(
    config: GLaMConfig, rows: int = 3, size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 1
) -> dict[str, Tensor]:
    """Arguments of `GLaM.loss`: the first row ends in padding, the second holds two segments."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, size + 1), generator=generator)
    segment_ids = torch.ones(rows, size, dtype=torch.int32)
    segment_ids[0, size - size // 3 :] = 0
    segment_ids[min(1, rows - 1), size // 2 :] += 1
    weights = (segment_ids != 0) * (0.5 + torch.rand(rows, size, generator=generator))
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "targets": tokens[:, 1:].contiguous(),
        "weights": weights.to(dtype),
        "segment_ids": segment_ids,
    }


def backward_of(loss: Loss) -> None:
    (loss.loss_sum + 0.3 * loss.aux + 0.01 * loss.router_z).backward()


def gradients_of(model: GLaM) -> dict[str, Tensor]:
    """A copy of every gradient; the model's are cleared."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad.clone()
    model.zero_grad()
    return gradients


def loss_and_gradients(model: GLaM, batch: Mapping[str, Tensor], **counters: int) -> dict[str, Tensor]:
    loss = model.loss(**batch, **counters)
    backward_of(loss)
    return {**{name: value.detach() for name, value in loss._asdict().items()}, **gradients_of(model)}


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name, value in actual.items() if not same_bits(value.detach(), expected[name].detach())]
    assert not different, different
