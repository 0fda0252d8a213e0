"""Top-2 gating samples.

Logits differ by at least 0.17 between the experts of a token, so that every precision makes the same choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import gating

from .base import Args, Op, Sample, generator_of, uniform


def separated_logits(name: str, tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    generator = generator_of(name)
    order = torch.rand(tokens, experts, generator=generator, dtype=torch.float64).argsort(dim=1)
    jitter = 0.2 * torch.rand(tokens, experts, generator=generator, dtype=torch.float64)
    return ((order - experts / 2) * 0.37 + jitter).to(dtype)


def _gating_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    def sample(
        name: str,
        tokens: int,
        experts: int,
        group: int,
        capacity: int,
        policy: str = "all",
        threshold: float = 0.0,
        before: bool = True,
        mask: bool = False,
    ) -> Sample:
        noise = None
        if policy != "all":
            noise = uniform(name + "noise", *((tokens,) if policy == "random" else (tokens, experts)))
        token_mask = uniform(name + "mask", tokens) < 0.8 if mask else None
        logits = separated_logits(name, tokens, experts, dtype)
        return Sample(name, (logits, token_mask, noise, group, capacity, policy, threshold, before), (0,))

    if level == "small":
        return [
            sample("all, no capacity", 14, 5, -1, -1),
            sample("all, groups, capacity, mask", 24, 5, 8, 2, mask=True),
            sample("all, normalise after", 24, 3, 12, 5, before=False, mask=True),
            sample("random", 26, 4, 13, 6, "random", 0.5),
            sample("random, normalise after", 21, 6, 7, 2, "random", 0.9, before=False),
            sample("sampling", 24, 5, 6, 2, "sampling", mask=True),
        ]
    if level == "tiles":
        sizes = [
            (15, 3, 5),
            (17, 4, -1),
            (31, 7, 31),
            (32, 9, 8),
            (33, 8, 11),
            (255, 16, 85),
            (257, 17, -1),
            (64, 33, 32),
        ]
        return [
            sample(f"T={t} E={e} S={s}", t, e, s, max(1, (t if s == -1 else s) // e), mask=index % 2 == 0)
            for index, (t, e, s) in enumerate(sizes)
        ]
    if level == "cuda":
        return [
            sample("E=65", 5, 65, -1, 1),
            sample("E=129", 6, 129, 3, 1, "random", 0.5),
            sample("E=300", 7, 300, -1, 1, "sampling"),
            sample("E=1024", 6, 1024, 2, 1, mask=True),
            sample("T=1100 in a group", 1100, 8, -1, 137, mask=True),
        ]
    if level == "edges":
        to_one = separated_logits("all to one", 12, 4, dtype)
        to_one[:, 2] += 9
        return [
            sample("no token", 0, 4, 6, 3),
            sample("one token", 1, 5, -1, 1),
            sample("one expert", 7, 1, -1, -1),
            sample("one expert, capacity", 6, 1, 3, 2),
            sample("groups of one token", 6, 4, 1, 1),
            Sample("all to one", (to_one, None, None, 6, 4, "all", 0.0, True), (0,)),
            Sample("all masked", (to_one, torch.zeros(12, dtype=torch.bool), None, 6, 4, "all", 0.0, True), (0,)),
        ]
    return [sample("large", 4096, 16, 512, 64, mask=True)]


def _gating_alone(args: Args, i: int) -> Args:
    logits, mask, noise, _, _, *rest = args
    cut = [None if x is None else x[i : i + 1] for x in (mask, noise)]
    return (logits[i : i + 1], *cut, -1, -1, *rest)


TOP2_GATING = Op(
    "top2_gating",
    lambda *args: gating.top2_gating(*args).outputs(),
    _gating_samples,
    differentiable=(0, 3),
    alone=_gating_alone,
    row=lambda outputs, i: (outputs[1][i : i + 1],),
    has_cuda=True,
)
