"""Samples of linear, router_logits, geglu_mlp, rms_norm, embedding and linear_cross_entropy."""

from __future__ import annotations

import torch

from tests.reference import loss, norm, routing

from .base import Args, Op, Sample, first_dim_row, one_output, randint, randn, uniform, weight_dtype

MATRIX_SIZES = {
    "small": [(6, 5, 7)],
    "tiles": [
        (3, 4, 5),
        (7, 8, 9),
        (16, 15, 17),
        (31, 33, 32),
        (63, 65, 64),
        (255, 31, 33),
        (257, 16, 7),
        (9, 257, 255),
        (5, 255, 256),
    ],
    "edges": [(0, 5, 3), (1, 6, 4), (4, 1, 5), (5, 3, 1)],
    "large": [(900, 130, 200)],
}


def _linear_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    samples = []
    for t, d, f in MATRIX_SIZES[level]:
        name = f"T={t} D={d} F={f}"
        weight = randn(name + "w", d, f, dtype=weight_dtype(dtype), scale=d**-0.5)
        samples.append(Sample(name, (randn(name, t, d, dtype=dtype), weight), (0, 1)))
    if level == "small":
        weight = randn("batched w", 5, 4, dtype=weight_dtype(dtype))
        samples.append(Sample("batched", (randn("batched", 2, 3, 5, dtype=dtype), weight), (0, 1)))
        weight = randn("same dtype w", 5, 4, dtype=dtype)
        samples.append(Sample("weight in x's dtype", (randn("same dtype", 3, 5, dtype=dtype), weight), (0, 1)))
    return samples


def _geglu_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    samples = []
    for t, d, f in MATRIX_SIZES[level]:
        name, wide = f"T={t} D={d} F={f}", weight_dtype(dtype)
        w0, w1 = (randn(name + w, d, f, dtype=wide, scale=d**-0.5) for w in ("w0", "w1"))
        wo = randn(name + "wo", f, d, dtype=wide, scale=f**-0.5)
        samples.append(Sample(name, (randn(name, t, d, dtype=dtype), w0, w1, wo), (0, 1, 2, 3)))
    if level == "small":
        shapes = ((2, 3, 5), (5, 4), (5, 4), (4, 5))
        args = tuple(randn(f"batched {n}", *shape, dtype=dtype) for n, shape in enumerate(shapes))
        samples.append(Sample("batched, weights in x's dtype", args, (0, 1, 2, 3)))
    return samples


def _norm_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    samples = []
    sizes = [(3, 1025), (2, 8200)] if level == "cuda" else [(t, d) for t, d, _ in MATRIX_SIZES[level]]
    for t, d in sizes:
        name = f"T={t} D={d}"
        scale = randn(name + "scale", d, dtype=weight_dtype(dtype))
        samples.append(Sample(name, (randn(name, t, d, dtype=dtype, scale=2.0), scale, 1e-6), (0, 1)))
    if level == "small":
        args = (randn("batched", 2, 3, 5, dtype=dtype), randn("batched scale", 5, dtype=weight_dtype(dtype)), 0.5)
        samples.append(Sample("batched, large eps", args, (0, 1)))
    if level == "edges":
        args = (torch.zeros(3, 4, dtype=dtype), torch.ones(4, dtype=weight_dtype(dtype)), 1e-6)
        samples.append(Sample("zeros", args, (0, 1)))
    return samples


def _embedding_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    sizes = {
        "small": [((2, 5), 7, 4)],
        "tiles": [((31,), 33, 8), ((3, 17), 15, 9), ((257,), 32, 31)],
        "edges": [((0,), 5, 3), ((1,), 1, 2), ((6,), 1, 5)],
        "large": [((3000,), 97, 64)],
        "cuda": [((40,), 9, 65), ((300,), 5, 520)],
    }
    return [
        Sample(f"{shape} V={v} D={d}", (randint(f"{shape}", v, *shape), randn(f"{v}{d}", v, d, dtype=dtype)), (1,))
        for shape, v, d in sizes[level]
    ]


def cut_first(args: Args, i: int) -> Args:
    return (args[0][i : i + 1], *args[1:])


LINEAR, LINEAR_WIDE = (
    Op(
        name,
        one_output(routing.linear),
        _linear_samples,
        weights=(1,),
        alone=cut_first,
        row=first_dim_row,
        library_product_on_cuda=True,
    )
    for name in ("linear", "linear_wide")
)
ROUTER_LOGITS = Op(
    "router_logits",
    one_output(routing.linear),
    _linear_samples,
    alone=cut_first,
    row=first_dim_row,
    library_product_on_cuda=True,
)
GEGLU_MLP = Op(
    "geglu_mlp", one_output(routing.geglu_mlp), _geglu_samples, weights=(1, 2, 3), alone=cut_first, row=first_dim_row
)
RMS_NORM = Op("rms_norm", one_output(norm.rms_norm), _norm_samples, alone=cut_first, row=first_dim_row, has_cuda=True)
EMBEDDING = Op(
    "embedding",
    one_output(routing.embedding),
    _embedding_samples,
    alone=cut_first,
    row=first_dim_row,
    has_cuda=True,
)


# Loss.


def _loss_samples(level: str, dtype: torch.dtype) -> list[Sample]:
    def sample(t: int, d: int, v: int, weighted: bool, *options: float) -> Sample:
        name = f"T={t} D={d} V={v} {options}"
        hidden = randn(name, t, d, dtype=dtype)
        table = randn(name + "table", v, d, dtype=weight_dtype(dtype))
        weights = uniform(name + "weights", t) * (uniform(name + "zero", t) < 0.8) if weighted else None
        if weights is not None and dtype == torch.float64:
            weights = weights.double()
        return Sample(name, (hidden, table, randint(name + "y", v, t), weights, *options), (0, 1))

    if level == "small":
        return [
            sample(6, 5, 7, False, 1.0, 0.0, 0.0, 0.0),
            sample(7, 4, 9, True, 0.5, 1e-2, 0.0, 0.0),
            sample(5, 3, 8, True, 0.7, 1e-2, 0.1, 0.0),
            sample(4, 5, 6, True, 0.7, 1e-2, 0.1, 2.0),
            sample(4, 5, 6, True, 0.7, 1e-2, 0.0, 2.0),
        ]
    if level == "tiles":
        more_than_a_block = [
            sample(12, 9, 2500, True, 0.3, 1e-3, 0.1, 0.0),
            sample(11, 8, 4200, True, 0.3, 1e-3, 0.0, 3.0),
        ]
        return more_than_a_block + [
            sample(t, d, v, n % 2 == 0, 0.3, 1e-3, 0.0, 0.0)
            for n, (t, d, v) in enumerate(
                [
                    (9, 8, 7),
                    (16, 17, 15),
                    (31, 33, 32),
                    (65, 16, 63),
                    (17, 31, 257),
                    (33, 9, 513),
                    (130, 15, 31),
                    (3, 255, 64),
                ]
            )
        ]
    if level == "edges":
        return [
            sample(0, 4, 5, True, 1.0, 1e-2, 0.0, 0.0),
            sample(1, 4, 5, False, 1.0, 1e-2, 0.0, 0.0),
            sample(3, 1, 2, True, 1.0, 0.0, 0.1, 0.0),
            sample(4, 3, 1, True, 1.0, 1e-2, 0.0, 0.0),
        ]
    return [sample(700, 64, 900, True, 0.125, 1e-4, 0.0, 0.0)]


def _loss_alone(args: Args, i: int) -> Args:
    hidden, table, targets, weights, *rest = args
    return (hidden[i : i + 1], table, targets[i : i + 1], None if weights is None else weights[i : i + 1], *rest)


LINEAR_CROSS_ENTROPY = Op(
    "linear_cross_entropy",
    loss.linear_cross_entropy,
    _loss_samples,
    weights=(1,),
    refuses_gradients=True,
    alone=_loss_alone,
    row=lambda outputs, i: tuple(x[i : i + 1] for x in outputs[1:]),
    library_product_on_cuda=True,
)
