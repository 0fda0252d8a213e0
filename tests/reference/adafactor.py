"""Adafactor as GLaM runs it, in float64 with loops over rows, columns and experts.

No momentum, decay 1 - (t + 1)^-0.8 at the 0-based step t, update clipping at RMS 1, step size lr * max(RMS(w), 1e-3).
The second moment of a matrix is kept as row and column means of the last two dimensions if both are at least
`min_factored`; leading dimensions (experts) are a batch of matrices. RMS is over the whole tensor.
Source: Shazeer and Stern (arXiv 1804.04235) with the settings of lingvo's XLAShardingAdafactor.
"""

from __future__ import annotations

import torch
from torch import Tensor


def learning_rate(step: int, multiplier: float = 1.0, decay_start: int = 10_000) -> float:
    """Constant until `decay_start`, then the inverse square root of the 0-based step."""
    return multiplier / max(step, decay_start) ** 0.5


def is_factored(shape: tuple[int, ...], min_factored: int = 128) -> bool:
    return len(shape) >= 2 and min(shape[-2:]) >= min_factored


def _rms(x: Tensor) -> float:
    return float((x.reshape(-1) ** 2).sum() / x.numel()) ** 0.5


class Adafactor:
    """One parameter's state; `update(grad, lr)` changes `weight` (float64) as one applied step does."""

    def __init__(self, weight: Tensor, min_factored: int = 128) -> None:
        self.weight = weight.double().clone()
        self.step = 0
        shape = tuple(weight.shape)
        self.factored = is_factored(shape, min_factored)
        if self.factored:
            self.row_var = torch.zeros(shape[:-1], dtype=torch.float64)
            self.col_var = torch.zeros((*shape[:-2], shape[-1]), dtype=torch.float64)
        else:
            self.variance = torch.zeros(shape, dtype=torch.float64)

    def update(self, grad: Tensor, lr: float) -> None:
        grad = grad.double()
        rho = 1.0 - float(self.step + 1) ** -0.8
        q = grad**2 + 1e-30
        if self.factored:
            rows, cols = grad.shape[-2:]
            u = torch.zeros_like(grad)
            flat_u, flat_q, flat_g = (x.view(-1, rows, cols) for x in (u, q, grad.contiguous()))
            row_var, col_var = self.row_var.view(-1, rows), self.col_var.view(-1, cols)
            for e in range(flat_q.shape[0]):
                for i in range(rows):
                    row_var[e, i] = rho * row_var[e, i] + (1 - rho) * flat_q[e, i, :].mean()
                for j in range(cols):
                    col_var[e, j] = rho * col_var[e, j] + (1 - rho) * flat_q[e, :, j].mean()
                mean_row = row_var[e].mean()
                for i in range(rows):
                    flat_u[e, i] = flat_g[e, i] / (row_var[e, i] / mean_row).sqrt() / col_var[e].sqrt()
        else:
            self.variance = rho * self.variance + (1 - rho) * q
            u = grad / self.variance.sqrt()
        u = u / max(1.0, _rms(u))
        self.weight = self.weight - lr * max(_rms(self.weight), 1e-3) * u
        self.step += 1
