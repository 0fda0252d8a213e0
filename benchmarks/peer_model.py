"""A GLaM-shaped model as most write it in Python today, for benchmarks/train_step.py.

Rows sorted by expert and torch's grouped product, scaled_dot_product_attention with a learned bias, cross_entropy of
the logits, torch.optim.Adafactor; weights float32, cast to bfloat16 in each step. No auxiliary or z-loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from moe_layer import sort_layer
from torch import Tensor, nn
from torch.nn import functional

from glam_ext import GLaMConfig
from glam_ext.data import Batch


def weight(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes) / sizes[-2] ** 0.5)


class Block(nn.Module):
    def __init__(self, config: GLaMConfig, layer: int, bucket: Tensor) -> None:
        super().__init__()
        D, F, E = config.model_dim, config.hidden_dim, config.num_experts
        self.heads, self.bucket, self.is_moe = config.num_heads, bucket, config.is_moe_layer(layer)
        self.qkv, self.o = weight(D, 3 * D), weight(D, D)
        self.relative_bias = nn.Parameter(torch.randn(config.num_heads, 32))
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(D)) for _ in range(2)])
        if self.is_moe:
            self.router, self.wi, self.wo = weight(D, E), weight(E, D, F), weight(E, F, D)
        else:
            self.w0, self.w1, self.wo = weight(D, F), weight(D, F), weight(F, D)

    def attention(self, x: Tensor) -> Tensor:
        B, S, D = x.shape
        q, k, v = (x @ self.qkv.to(x.dtype)).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_bias[:, self.bucket].to(x.dtype)
        mask = torch.full((S, S), float("-inf"), dtype=x.dtype).triu(1)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=(bias + mask)[None], scale=1.0)
        return y.transpose(1, 2).reshape(B, S, D) @ self.o.to(x.dtype)

    def feed_forward(self, x: Tensor) -> Tensor:
        if self.is_moe:
            return sort_layer(x.flatten(0, 1), self.router, self.wi, self.wo).view(x.shape)
        w0, w1, wo = (w.to(x.dtype) for w in (self.w0, self.w1, self.wo))
        return (functional.gelu(x @ w0, approximate="tanh") * (x @ w1)) @ wo

    def forward(self, x: Tensor) -> Tensor:
        for norm, part in zip(self.norms, (self.attention, self.feed_forward), strict=True):
            x = x + part(functional.rms_norm(x, x.shape[-1:], norm.to(x.dtype), 1e-6))
        return x


class Peer(nn.Module):
    def __init__(self, config: GLaMConfig, length: int) -> None:
        super().__init__()
        distance = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
        far = 16 + (torch.log(distance.clamp(min=1) / 16) / torch.log(torch.tensor(8.0)) * 16).long()
        bucket = torch.where(distance < 16, distance, far.clamp(max=31))
        self.embedding = nn.Parameter(torch.randn(config.vocab_size, config.model_dim))
        self.blocks = nn.ModuleList([Block(config, layer, bucket) for layer in range(config.num_layers)])

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding[tokens].bfloat16()
        for block in self.blocks:
            x = block(x)
        logits = x.flatten(0, 1) @ self.embedding.to(x.dtype).t() * x.shape[-1] ** -0.5
        return functional.cross_entropy(logits.float(), targets.flatten())


def training(config: GLaMConfig, batch: Batch) -> Callable[[], None]:
    model = Peer(config, batch.tokens.shape[1])
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)

    def step() -> None:
        model(batch.tokens, batch.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
