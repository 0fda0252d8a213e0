"""Sample inputs of every op, one generator per op, for all levels of tests/ops/levels.py.

Letters as in the ops: T, D, F, E, K, R, C, G, H, A, V differ wherever a mistake could hide behind equal sizes.
A level asks `OP.samples(level, dtype)`: "small" (every option, tiny), "tiles" (sizes around powers of two), "edges"
(no token, one token, one expert, all to one expert, an empty expert), "large" (more than one thread has work); of some
ops "cuda" (just beyond what a warp, a block or a launch of the CUDA kernels holds, and other ways of theirs alone).
"""

from __future__ import annotations

from .attention import RELATIVE_ATTENTION, RELATIVE_ATTENTION_STEP, REORDER_CACHE
from .base import LEVELS, Op, Sample
from .dense import EMBEDDING, GEGLU_MLP, LINEAR, LINEAR_CROSS_ENTROPY, LINEAR_WIDE, RMS_NORM, ROUTER_LOGITS
from .gating import TOP2_GATING
from .routing import COMBINE, DISPATCH, EXCHANGE, EXCHANGE_MLP, EXPERT_MLP, MOE_MLP, ROUTING_PLAN

OPS = (
    TOP2_GATING,
    ROUTING_PLAN,
    DISPATCH,
    COMBINE,
    EXPERT_MLP,
    MOE_MLP,
    LINEAR,
    LINEAR_WIDE,
    ROUTER_LOGITS,
    GEGLU_MLP,
    RMS_NORM,
    EMBEDDING,
    RELATIVE_ATTENTION,
    RELATIVE_ATTENTION_STEP,
    REORDER_CACHE,
    LINEAR_CROSS_ENTROPY,
    EXCHANGE,
    EXCHANGE_MLP,
)

__all__ = ["LEVELS", "OPS", "Op", "Sample"]
