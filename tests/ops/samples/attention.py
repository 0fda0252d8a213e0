"""Samples of relative_attention, its cached step, and the reordering of a cache by beams."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import attention

from .base import Args, Op, Sample, first_dim_row, one_output, randint, randn

ATTENTION_SIZES = {  # B, S, H, A
    "small": [(2, 5, 3, 4)],
    "tiles": [
        (2, 7, 3, 8),
        (1, 16, 2, 5),
        (3, 17, 2, 4),
        (2, 31, 1, 9),
        (1, 33, 3, 16),
        (1, 64, 2, 7),
        (2, 65, 3, 17),
        (1, 130, 2, 31),
    ],
    "edges": [(0, 4, 2, 3), (1, 1, 2, 3), (2, 3, 1, 1)],
    "large": [(4, 96, 6, 32)],
    "cuda": [],
}


def _segments(name: str, b: int, s: int) -> Tensor:
    """Two or three segments per row and padding at the end."""
    cuts = randint(name + "cuts", max(s, 2), b, 3).sort(dim=1).values
    index = torch.arange(s)
    ids = 1 + (index[None, :] >= cuts[:, :1]).int() + (index[None, :] >= cuts[:, 1:2]).int()
    return torch.where(index[None, :] >= s - s // 5, torch.zeros((), dtype=torch.int32), ids).to(torch.int32)


def _attention_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, size: tuple[int, ...], packed: bool, extra: bool, cap: float) -> Sample:
        b, s, h, a = size
        q, k, v = (randn(name + c, b, s, h, a, dtype=dtype, scale=a**-0.25 if c != "v" else 1.0) for c in "qkv")
        bias = randn(name + "bias", h, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        segment_ids = _segments(name, b, s) if packed else None
        # torch's memory-efficient attention rounds bias and output to the dtype of q, of which its gradients are made:
        # of those in 16 bits there is a test of its own.
        grad = () if level == "cuda" and dtype.itemsize == 2 else (0, 1, 2, 3)
        return Sample(name, (q, k, v, bias, segment_ids, extra, cap), grad)

    samples = []
    for n, size in enumerate(ATTENTION_SIZES[level]):
        samples.append(sample(f"{size}", size, n % 2 == 1, n % 3 != 2, 1.5 if n % 4 == 3 else 0.0))
    if level == "small":
        samples.append(sample("packed", (2, 11, 2, 3), True, True, 0.0))
        samples.append(sample("packed, no extra logit", (2, 10, 2, 3), True, False, 0.0))
        samples.append(sample("capped", (2, 6, 2, 3), False, True, 2.0))
    if level == "cuda":  # torch's memory-efficient attention
        samples.append(sample("A=8", (3, 19, 3, 8), False, True, 0.0))
        samples.append(sample("packed, A=8", (2, 33, 2, 8), True, True, 0.0))
        samples.append(sample("packed, A=16, no extra logit", (1, 18, 3, 16), True, False, 0.0))
    if level == "edges":
        q, k, v, bias, *_ = samples[-1].args
        padding = torch.zeros(q.shape[:2], dtype=torch.int32)
        for extra in (True, False):
            samples.append(Sample(f"all padding, {extra}", (q, k, v, bias, padding, extra, 0.0), (0, 1, 2, 3)))
    return samples


def _attention_alone(args: Args, i: int) -> Args:
    q, k, v, bias, segment_ids, *rest = args
    cut = None if segment_ids is None else segment_ids[i : i + 1]
    return (q[i : i + 1], k[i : i + 1], v[i : i + 1], bias, cut, *rest)


def _step_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, n: int, h: int, a: int, length: int, positions: list[int], extra: bool, cap: float) -> Sample:
        b = len(positions)
        q, k, v = (randn(name + c, b, n, h, a, dtype=dtype, scale=a**-0.25 if c != "v" else 1.0) for c in "qkv")
        caches = (randn(name + c, b, length, h, a, dtype=dtype) for c in ("kc", "vc"))
        bias = randn(name + "bias", h, 32, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        start = torch.tensor(positions, dtype=torch.int32)
        return Sample(name, (q, k, v, *caches, start, bias, extra, cap))

    if level == "small":
        return [
            sample("one new", 1, 3, 4, 9, [4, 0, 8], True, 0.0),
            sample("prefill, finished row", 5, 2, 3, 8, [0, -1, 3], True, 0.0),
            sample("no extra logit, cap", 2, 3, 4, 7, [3, 5], False, 1.5),
        ]
    if level == "cuda":  # torch's memory-efficient attention
        return [
            sample("finished row, A=8", 3, 2, 8, 12, [5, -1, 0], True, 0.0),
            sample("finished row, A=16, no extra logit", 1, 3, 16, 9, [-1, 7], False, 0.0),
            sample("one new, A=8", 1, 3, 8, 34, [31, 15, 16, 32, 0], True, 0.0),
        ]
    if level == "tiles":
        return [
            sample(f"N={n} at {p}", n, h, a, length, p, index % 2 == 0, 0.0)
            for index, (n, h, a, length, p) in enumerate(
                [
                    (1, 2, 8, 33, [31, 15, 16, 32]),
                    (7, 3, 9, 40, [33, 9]),
                    (17, 2, 16, 65, [0, 48]),
                    (1, 1, 31, 131, [130, 127, 128]),
                    (33, 2, 5, 33, [0]),
                ]
            )
        ]
    if level == "edges":
        return [
            sample("no row", 1, 2, 3, 4, [], True, 0.0),
            sample("all finished", 2, 2, 3, 4, [-1, -1], True, 0.0),
            sample("cache of one", 1, 1, 1, 1, [0], False, 0.0),
        ]
    return [sample("large", 24, 6, 32, 128, [0, 40, 104, 17], True, 0.0)]


def _step_alone(args: Args, i: int) -> Args:
    return (*(x[i : i + 1] for x in args[:6]), *args[6:])


RELATIVE_ATTENTION = Op(
    "relative_attention",
    one_output(attention.relative_attention),
    _attention_samples,
    alone=_attention_alone,
    row=first_dim_row,
    library_product_on_cuda=True,
    has_cuda=True,
)
RELATIVE_ATTENTION_STEP = Op(
    "relative_attention_step",
    attention.relative_attention_step,
    _step_samples,
    differentiable=(),
    mutated=(3, 4),
    alone=_step_alone,
    row=first_dim_row,
    library_product_on_cuda=True,
    has_cuda=True,
)


def _reorder_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    sizes = {
        "small": [((3, 4, 2), [2, 0, 0]), ((4, 5), [3, 2, 1, 0])],
        "tiles": [((5, 17, 3, 9), [4, 4, 1, 0, 2]), ((2, 31, 33), [1, 0])],
        "edges": [((0, 4), []), ((1, 3), [0]), ((3,), [1, 2, 0])],
        "large": [((8, 64, 6, 32), [7, 0, 3, 3, 1, 2, 6, 5])],
        "cuda": [((400, 3), [(7 * n + 3) % 400 for n in range(400)])],
    }
    return [
        Sample(f"{s} {beams}", (randn(f"{s}", *s, dtype=dtype), torch.tensor(beams).long()))
        for s, beams in sizes[level]
    ]


REORDER_CACHE = Op(
    "reorder_cache_",
    lambda cache, beams: (torch.stack([cache[int(b)] for b in beams]) if len(beams) else cache.clone(),),
    _reorder_samples,
    differentiable=(),
    mutated=(0,),
    has_cuda=True,
)
