"""Parameter counts, tensor shapes, FLOPs and memory of a configuration, by arithmetic; no model is built.

Letters: V vocabulary, L layers, D model dim, F hidden dim, H heads, A head dim, E experts. Counts come from the C++
``glam::count_parameters``; the shapes are the model's parameter names and sizes, written out a second time so that a
test can hold the three (counts, shapes, a model built on the meta device) equal.
"""

from __future__ import annotations

import dataclasses
import math

from glam_ext import _C
from glam_ext.config import GLaMConfig

RELATIVE_BUCKETS = 32
EXPERTS_PER_TOKEN = 2
_BYTES_FP32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters by part; ``total`` is their sum, ``active`` counts two experts per MoE layer instead of E."""

    total: int
    active: int
    attention: int
    dense_ffn: int
    experts: int
    router: int
    embedding: int
    norms: int
    relative_bias: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Floating-point operations of one token's forward pass, two per multiply-add, by part."""

    attention_projections: int
    attention_scores: int
    dense_ffn: int
    experts: int
    router: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def count_parameters(config: GLaMConfig) -> ParameterCount:
    """Exact counts of ``config``, equal to those of the built model."""
    return ParameterCount(**_C.count_parameters(config.to_json()))


def parameter_shapes(config: GLaMConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and global shape, in the model's order."""
    vocab, model, hidden = config.vocab_size, config.model_dim, config.hidden_dim
    inner = config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab, model)}
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "attention_norm.scale"] = (model,)
        for name in ("q", "k", "v"):
            shapes[f"{prefix}attention.{name}"] = (model, inner)
        shapes[prefix + "attention.o"] = (inner, model)
        shapes[prefix + "attention.relative_bias"] = (config.num_heads, RELATIVE_BUCKETS)
        shapes[prefix + "ffn_norm.scale"] = (model,)
        if config.is_moe_layer(layer):
            shapes[prefix + "moe.router"] = (model, config.num_experts)
            shapes[prefix + "moe.wi"] = (config.num_experts, model, hidden)
            if config.expert_activation == "geglu":
                shapes[prefix + "moe.wg"] = (config.num_experts, model, hidden)
            shapes[prefix + "moe.wo"] = (config.num_experts, hidden, model)
        else:
            shapes[prefix + "ffn.w0"] = (model, hidden)
            shapes[prefix + "ffn.w1"] = (model, hidden)
            shapes[prefix + "ffn.wo"] = (hidden, model)
    shapes["final_norm.scale"] = (model,)
    if not config.tie_embedding:
        shapes["output.weight"] = (vocab, model)
    return shapes


def is_expert_weight(name: str) -> bool:
    """True for the tensors that carry the expert axis and are split by expert parallelism."""
    return name.endswith((".moe.wi", ".moe.wg", ".moe.wo"))


def flops_per_token(config: GLaMConfig, context: float) -> TokenFlops:
    """Forward FLOPs of one token that attends to ``context`` positions (a causal sequence of S has S / 2 on average).

    Matrix products only: norms, softmaxes and the routing itself are left out.
    """
    count = count_parameters(config)
    expert_matrices = 3 if config.expert_activation == "geglu" else 2
    expert = expert_matrices * config.model_dim * config.hidden_dim
    inner = config.num_heads * config.head_dim
    return TokenFlops(
        attention_projections=2 * count.attention,
        attention_scores=round(2 * 2 * config.num_layers * inner * context),
        dense_ffn=2 * count.dense_ffn,
        experts=2 * config.num_moe_layers * EXPERTS_PER_TOKEN * expert,
        router=2 * count.router,
        logits=2 * config.vocab_size * config.model_dim,
    )


def adafactor_state_elements(shape: tuple[int, ...], min_factored_dim: int = 128) -> int:
    """Numbers Adafactor keeps for a tensor: row and column means over the last two dims, or one per weight."""
    if len(shape) < 2 or min(shape[-2:]) < min_factored_dim:
        return math.prod(shape)
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])


def expert_parallel_size(config: GLaMConfig, devices: int) -> int:
    """The most devices, a divisor of ``devices``, over which the experts split evenly."""
    return math.gcd(devices, config.num_experts) if config.num_experts > 1 else 1


def training_memory(config: GLaMConfig, devices: int = 1) -> dict[str, int]:
    """Bytes per device of weights, gradients and Adafactor state in fp32; activations are not counted.

    Experts are split over :func:`expert_parallel_size` devices, everything else is replicated.
    """
    split = expert_parallel_size(config, devices)
    weights = state = 0
    for name, shape in parameter_shapes(config).items():
        held = (shape[0] // split, *shape[1:]) if is_expert_weight(name) else shape
        weights += math.prod(held)
        state += adafactor_state_elements(held)
    return {
        "weights": _BYTES_FP32 * weights,
        "gradients": _BYTES_FP32 * weights,
        "adafactor": _BYTES_FP32 * state,
        "total": _BYTES_FP32 * (2 * weights + state),
    }
