"""GLaM in plain PyTorch and float64: the einsum form with the [G, S, E, C] tensors and no op of the library.

Parameters are a dict named as the library's state_dict; weights are [in, out]. `config` has GLaMConfig's fields.
`noise[n]` holds layer n's uniform numbers ([T] for the random policy, [T, E] for sampling), `jitter[n]` [T, D] the
factors on the router's input. Autograd gives the gradients.
Sources: GLaM (arXiv 2112.06905), praxis glam.py and gshard_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention, loss, norm
from .gating import FLT_MAX, TINY, capacity_of

Parameters = Mapping[str, Tensor]


@dataclass
class Output:
    """logits [B, S, V]; loss_sum and aux [] (aux reduced over MoE layers, without its weight); nll, lse [B, S]."""

    logits: Tensor
    aux: Tensor
    router_z: Tensor
    aux_of_layer: list[Tensor]
    loss_sum: Tensor | None = None
    nll: Tensor | None = None
    lse: Tensor | None = None
    dropped_first: int = 0
    dropped_second: int = 0
    empty_experts: int = 0
    combine_of_layer: list[Tensor] = field(default_factory=list)


@dataclass
class Moe:
    y_TD: Tensor
    combine_GSEC: Tensor
    aux: Tensor
    router_z: Tensor
    dropped_first: int
    dropped_second: int


def is_moe_layer(config: Any, layer: int) -> bool:
    return config.num_experts > 1 and layer % 2 == (0 if config.moe_first else 1)


def gate(
    z_GSE: Tensor, real_GS: Tensor, noise: Tensor | None, config: Any, capacity: int
) -> tuple[Tensor, Tensor, int, int]:
    """combine [G, S, E, C] and aux [G]; also how many first and second choices found their expert full."""
    groups, size, experts = z_GSE.shape
    slots = 2 * size if capacity == -1 else capacity
    p_GSE = torch.softmax(z_GSE, dim=2)
    mask1_GSE = F.one_hot(p_GSE.argmax(dim=2), experts) * real_GS[..., None]
    rest_GSE = p_GSE * (1 - mask1_GSE)
    choice_GSE = rest_GSE.detach()
    if config.second_policy == "sampling":
        assert noise is not None
        gumbel_GSE = -torch.log(-torch.log(noise.double().reshape(z_GSE.shape)))
        choice_GSE = torch.where(mask1_GSE.bool(), -0.7 * FLT_MAX, z_GSE.detach()) + gumbel_GSE
    mask2_GSE = F.one_hot(choice_GSE.argmax(dim=2), experts) * real_GS[..., None]
    g1_GS, g2_GS = (p_GSE * mask1_GSE).sum(2), (rest_GSE * mask2_GSE).sum(2)
    norm_GS = g1_GS + g2_GS + TINY
    if config.second_policy == "random":
        assert noise is not None
        keep_GS = noise.double().reshape(groups, size) * max(config.second_threshold, TINY) < g2_GS / norm_GS
        mask2_GSE = mask2_GSE * keep_GS[..., None]
    if config.normalize_before_capacity:
        g1_GS, g2_GS = g1_GS / norm_GS, g2_GS / norm_GS

    position1_GSE = mask1_GSE.cumsum(1) - mask1_GSE
    kept1_GSE = mask1_GSE * (position1_GSE < slots)
    position2_GSE = mask2_GSE.cumsum(1) - mask2_GSE + kept1_GSE.sum(1, keepdim=True)
    kept2_GSE = mask2_GSE * (position2_GSE < slots)
    g1_GS, g2_GS = g1_GS * kept1_GSE.sum(2), g2_GS * kept2_GSE.sum(2)
    if not config.normalize_before_capacity:
        total_GS = g1_GS + g2_GS
        total_GS = torch.where(total_GS > 0, total_GS, 1.0)
        g1_GS, g2_GS = g1_GS / total_GS, g2_GS / total_GS

    slot1_GSEC = kept1_GSE[..., None] * F.one_hot(position1_GSE.clamp(0, slots - 1), slots)
    slot2_GSEC = kept2_GSE[..., None] * F.one_hot(position2_GSE.clamp(0, slots - 1), slots)
    combine_GSEC = g1_GS[..., None, None] * slot1_GSEC + g2_GS[..., None, None] * slot2_GSEC
    mean_GE = (p_GSE * real_GS[..., None]).mean(1)
    aux_G = experts**2 * (mask1_GSE.double().mean(1) * mean_GE).mean(1)
    dropped1 = int(mask1_GSE.sum() - kept1_GSE.sum())
    return combine_GSEC, aux_G, dropped1, int(mask2_GSE.sum() - kept2_GSE.sum())


def moe(
    x_TD: Tensor,
    real_T: Tensor,
    p: Parameters,
    prefix: str,
    config: Any,
    group_size: int,
    capacity: int,
    noise: Tensor | None,
    jitter: Tensor | None,
) -> Moe:
    """One MoE feed-forward by the GSEC einsums."""
    z_TE = (x_TD if jitter is None else x_TD * jitter.double()) @ p[prefix + "router"]
    if config.router_logit_cap > 0:
        z_TE = config.router_logit_cap * torch.tanh(z_TE / config.router_logit_cap)
    z_GSE = z_TE.reshape(-1, group_size, z_TE.shape[1])
    combine_GSEC, aux_G, dropped1, dropped2 = gate(
        z_GSE, real_T.reshape(-1, group_size).long(), noise, config, capacity
    )
    dispatch_GSEC = (combine_GSEC != 0).double()
    rows_EGCD = torch.einsum("gsec,gsd->egcd", dispatch_GSEC, x_TD.reshape(-1, group_size, x_TD.shape[1]))
    hidden_EGCF = torch.einsum("egcd,edf->egcf", rows_EGCD, p[prefix + "wi"])
    if config.expert_activation == "relu":
        hidden_EGCF = torch.relu(hidden_EGCF)
    elif config.expert_activation == "gelu":
        hidden_EGCF = F.gelu(hidden_EGCF, approximate="tanh")
    else:
        gate_EGCF = torch.einsum("egcd,edf->egcf", rows_EGCD, p[prefix + "wg"])
        hidden_EGCF = F.gelu(gate_EGCF, approximate="tanh") * hidden_EGCF
    out_EGCD = torch.einsum("egcf,efd->egcd", hidden_EGCF, p[prefix + "wo"])
    y_GSD = torch.einsum("gsec,egcd->gsd", combine_GSEC, out_EGCD)
    router_z = (torch.logsumexp(z_TE, dim=1) ** 2 * real_T).sum()
    return Moe(y_GSD.reshape(x_TD.shape), combine_GSEC, aux_G.mean(), router_z, dropped1, dropped2)


def forward(
    parameters: Parameters,
    config: Any,
    tokens: Tensor,
    targets: Tensor | None = None,
    weights: Tensor | None = None,
    segment_ids: Tensor | None = None,
    training: bool = True,
    noise: Mapping[int, Tensor] | None = None,
    jitter: Mapping[int, Tensor] | None = None,
) -> Output:
    """The whole model: tokens, targets, segment_ids [B, S] and weights [B, S]; with targets also the loss."""
    p = {name: value.double() for name, value in parameters.items()}
    batch, size = tokens.shape
    heads, width = config.num_heads, config.head_dim
    real_T = torch.ones(batch * size) if segment_ids is None else (segment_ids != 0).reshape(-1)
    group_size = {0: size, -1: batch * size}.get(config.group_size, config.group_size)
    factor = config.capacity_factor if training else config.eval_capacity_factor
    capacity = -1 if factor is None else capacity_of(group_size, factor, max(config.num_experts, 1))
    layers: list[Moe] = []

    x = p["embedding.weight"][tokens.long()]
    for n in range(config.num_layers):
        prefix = f"layers.{n}."
        h = norm.rms_norm(x, p[prefix + "attention_norm.scale"], config.norm_eps)
        q, k, v = ((h @ p[f"{prefix}attention.{c}"]).reshape(batch, size, heads, width) for c in "qkv")
        bias = p[prefix + "attention.relative_bias"]
        o = attention.relative_attention(
            q, k, v, bias, segment_ids, config.attention_extra_logit, config.attention_logit_cap
        )
        x = x + o.reshape(batch, size, heads * width) @ p[prefix + "attention.o"]
        h = norm.rms_norm(x, p[prefix + "ffn_norm.scale"], config.norm_eps)
        if is_moe_layer(config, n):
            layers.append(
                moe(
                    h.reshape(batch * size, -1),
                    real_T,
                    p,
                    prefix + "moe.",
                    config,
                    group_size,
                    capacity,
                    None if noise is None else noise[n],
                    None if jitter is None else jitter[n],
                )
            )
            x = x + layers[-1].y_TD.reshape(x.shape)
        else:
            gated = F.gelu(h @ p[prefix + "ffn.w0"], approximate="tanh") * (h @ p[prefix + "ffn.w1"])
            x = x + gated @ p[prefix + "ffn.wo"]

    h = norm.rms_norm(x, p["final_norm.scale"], config.norm_eps)
    table = p["embedding.weight"] if config.tie_embedding else p["output.weight"]
    scale = config.model_dim**-0.5
    logits = scale * h @ table.T
    if config.logit_cap > 0:
        logits = config.logit_cap * torch.tanh(logits / config.logit_cap)

    zero = torch.zeros((), dtype=torch.float64)
    divide = max(len(layers), 1) if config.aux_loss_reduction == "mean" else 1
    output = Output(
        logits=logits,
        aux=sum((m.aux for m in layers), zero) / divide,
        router_z=sum((m.router_z for m in layers), zero),
        aux_of_layer=[m.aux for m in layers],
        dropped_first=sum(m.dropped_first for m in layers),
        dropped_second=sum(m.dropped_second for m in layers),
        empty_experts=sum(int((m.combine_GSEC != 0).sum((0, 1, 3)).eq(0).sum()) for m in layers),
        combine_of_layer=[m.combine_GSEC for m in layers],
    )
    if targets is not None:
        output.loss_sum, nll, lse = loss.linear_cross_entropy(
            h.reshape(batch * size, -1),
            table,
            targets.reshape(-1),
            None if weights is None else weights.reshape(-1),
            scale,
            config.z_loss,
            config.label_smoothing,
            config.logit_cap,
        )
        output.nll, output.lse = nll.reshape(tokens.shape), lse.reshape(tokens.shape)
    return output


def parameter_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, in the model's order."""
    d, f, h = config.model_dim, config.hidden_dim, config.num_heads
    e, wide = config.num_experts, config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, d)}
    for n in range(config.num_layers):
        prefix = f"layers.{n}."
        shapes[prefix + "attention_norm.scale"] = (d,)
        shapes |= {f"{prefix}attention.{c}": (d, wide) for c in "qkv"}
        shapes |= {prefix + "attention.o": (wide, d), prefix + "attention.relative_bias": (h, 32)}
        shapes[prefix + "ffn_norm.scale"] = (d,)
        if is_moe_layer(config, n):
            shapes |= {prefix + "moe.router": (d, e), prefix + "moe.wi": (e, d, f), prefix + "moe.wo": (e, f, d)}
            if config.expert_activation == "geglu":
                shapes[prefix + "moe.wg"] = (e, d, f)
        else:
            shapes |= {prefix + "ffn.w0": (d, f), prefix + "ffn.w1": (d, f), prefix + "ffn.wo": (f, d)}
    shapes["final_norm.scale"] = (d,)
    if not config.tie_embedding:
        shapes["output.weight"] = (config.vocab_size, d)
    return shapes


def random_parameters(config: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every parameter random and of sensible size (scales around 1): for comparisons, not the initialisation."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in parameter_shapes(config).items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("scale"):
            value = 1 + 0.1 * value
        elif not name.startswith("embedding") and not name.endswith("relative_bias"):
            value = value / shape[-2] ** 0.5
        parameters[name] = value.to(dtype)
    return parameters
