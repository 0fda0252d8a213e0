"""Cross entropy of a linear output layer, one token at a time in float64.

loss_sum = sum of weights * (nll + z_loss * lse^2); nll and lse [T] are unweighted and have no z in them.
Label smoothing mixes the target with the uniform distribution over all V words: (1 - s) one_hot + s / V.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    embedding: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    scale: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    logit_cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], embedding [V, D], targets [T], weights [T] -> loss_sum [], nll [T], lse [T]."""
    loss_sum = torch.zeros((), dtype=torch.float64)
    nlls, lses = [], []
    for t in range(hidden.shape[0]):
        logits = scale * (embedding.double() @ hidden[t].double())
        if logit_cap > 0:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        lse = logits.max().detach() + (logits - logits.max().detach()).exp().sum().log()
        nll = lse - logits[int(targets[t])]
        smoothed = (1 - label_smoothing) * nll + label_smoothing * (lse - logits.mean())
        weight = 1.0 if weights is None else weights[t].double()
        loss_sum = loss_sum + weight * (smoothed + z_loss * lse**2)
        nlls.append(nll)
        lses.append(lse)
    empty = torch.zeros(0, dtype=torch.float64)
    return loss_sum, torch.stack(nlls) if nlls else empty, torch.stack(lses) if lses else empty
