"""One training run on any layout of ranks: what a rank sees of it, and the whole put together again.

The batches have what is hard: padding in different amounts, a rank with padding alone, two segments in a row, an expert
that nobody chooses at first, and with capacity both first and second choices that are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glam_ext import GLaM, GLaMConfig
from glam_ext.data import Batch, Whole
from glam_ext.distributed import GradientReducer, Mesh, init_mesh
from glam_ext.training import TrainingConfig
from glam_ext.training.config import DataSection, OptimizerSection, RunSection, ScheduleSection
from glam_ext.training.optimizers import make_updater
from glam_ext.training.step import accumulate_gradients
from tests.guards import COLLECTIVE_SECONDS

ROWS, LENGTH, EXPERTS, EMPTY_EXPERT, STEPS = 16, 12, 8, 7, 5


@dataclass(frozen=True)
class Case:
    """A way to train; `model` are fields of GLaMConfig beside the small sizes."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    micro_batches: int = 1  # of each rank
    chunks: int = 1
    optimizer: str = "adafactor"
    clip_norm: float = 0.0
    denominator: str = "tokens"
    steps: int = STEPS

    @property
    def config(self) -> GLaMConfig:
        sizes = {
            "vocab_size": 48, "num_layers": 3, "model_dim": 12, "hidden_dim": 20, "num_heads": 2, "head_dim": 6,
            "num_experts": EXPERTS, "compute_dtype": "float32", "capacity_factor": 1.0, "router_z_loss": 1e-3,
        }  # fmt: skip
        return GLaMConfig(**{**sizes, **self.model})

    @property
    def is_capped(self) -> bool:
        return self.config.capacity_factor > 0


CASES = {
    case.name: case
    for case in (
        Case("capped", micro_batches=2),
        Case("capped, bucketed clipping", clip_norm=0.05, chunks=2, denominator="positions"),
        Case("dropless", {"capacity_factor": 0.0}, chunks=2),
        Case(
            "dropless geglu, recomputed",
            {"capacity_factor": 0.0, "expert_activation": "geglu", "recompute": True, "tie_embedding": False},
            micro_batches=2,
            optimizer="adamw",
        ),
        Case("random second choices", {"second_policy": "random", "second_threshold": 0.7, "router_jitter": 0.1}),
        Case("float32", dtype=torch.float32, micro_batches=2, clip_norm=1.0),
        Case("bfloat16", {"compute_dtype": "bfloat16"}, dtype=torch.float32, steps=1),
    )
}


@dataclass
class Outcome:
    """Of the whole run; on many ranks the parts of the expert weights have been joined again."""

    logits: list[Tensor]  # [T, E] of each MoE layer in the first step, as ids and positions
    ids: list[Tensor]  # int32 [T, 2] of each MoE layer in the first step
    positions: list[Tensor]
    sums: list[dict[str, float]]  # of each step
    statistics: Tensor  # of the first step
    norms: list[float]
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


def global_batch(case: Case, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    config = case.config
    tokens = torch.randint(config.vocab_size, (ROWS, LENGTH + 1), generator=generator)
    segment_ids = torch.ones(ROWS, LENGTH, dtype=torch.int32)
    segment_ids[:, LENGTH // 2 :] = 2
    for row in range(ROWS):
        segment_ids[row, LENGTH - row % 4 :] = 0
    segment_ids[-ROWS // 8 :] = 0  # with eight ranks all rows of the last one
    weights = (segment_ids != 0).float()
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights, segment_ids)


def empty_an_expert(model: GLaM) -> None:
    """The last expert's logit becomes the mean of the others', which is never among the two largest here."""
    for name, parameter in model.named_parameters():
        if name.endswith("router"):
            parameter.data[:, EMPTY_EXPERT] = parameter.data[:, :EMPTY_EXPERT].mean(1)


class Routing(TorchDispatchMode):
    """Records what every gating op of the C++ model chose. Logits that are given replace the model's own, call by call:
    where rounding differs, the choices stay comparable."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._given = given
        self.logits: list[Tensor] = []
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gating = "top2_gating" in func.name() and "backward" not in func.name()
        if gating and self._given:
            args = (self._given[len(self.ids)], *args[1:])
        out = func(*args, **(kwargs or {}))
        if gating:
            self.logits.append(args[0].clone())
            self.ids.append(out[1].clone())
            self.positions.append(out[2].clone())
        return out


@contextmanager
def recorded_routing(wanted: bool, given: list[Tensor]) -> Iterator[Routing]:
    routing = Routing(given)
    if not wanted:
        yield routing
        return
    with routing:
        yield routing


def train(case: Case, mesh: Mesh, given: list[Tensor] | None = None) -> dict[str, Any]:
    """What this rank sees of the run. `given` are the router logits of the first step's whole batch, to route by."""
    config = case.config
    group = mesh.group_name("expert")
    model = GLaM(config, seed=5, expert_group=group, exchange_chunks=case.chunks if group else 1)
    empty_an_expert(model)
    model.to(case.dtype)
    reducer = GradientReducer.of_model(model, mesh, bucket_bytes=4096)
    updater = make_updater(training_config(case), model, group)
    share = ROWS // mesh.world_size
    first = mesh.rank * share
    seen: dict[str, Any] = {"sums": [], "norms": [], "experts": model.local_experts}
    for step in range(case.steps):
        every = global_batch(case, step)
        batch = Batch(*(tensor[first : first + share] for tensor in every))
        here = slice(first * LENGTH, (first + share) * LENGTH)
        with recorded_routing(step == 0, [logits[here] for logits in given or []]) as routing:
            sums = accumulate_gradients(
                model,
                batch,
                max(share // case.micro_batches, 1),
                whole=Whole(ROWS, int(every.weights.sum()), first),
                reducer=reducer,
                denominator=case.denominator,
                seed=11,
                step=step,
            ).over_ranks(mesh)
        if step == 0:
            # With recomputation the backward pass chooses again, last layers first: the others' order does not hold.
            layers = 0 if config.recompute else config.num_moe_layers
            seen["logits"] = [torch.cat(routing.logits[layer::layers]) for layer in range(layers)]
            seen["ids"] = [torch.cat(routing.ids[layer::layers]) for layer in range(layers)]
            seen["positions"] = [torch.cat(routing.positions[layer::layers]) for layer in range(layers)]
            seen["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
            seen["statistics"] = sums.router_statistics
        seen["sums"].append({name: float(getattr(sums, name)) for name in ("total", "nll", "aux", "router_z")})
        seen["norms"].append(float(updater.update(step)))
    seen["weights"] = {name: p.detach() for name, p in model.named_parameters()}
    seen["state"] = updater.state_tensors()
    return seen


def training_config(case: Case) -> TrainingConfig:
    options = {"min_factored": 12} if case.optimizer == "adafactor" else {}
    schedule = (
        ScheduleSection() if case.optimizer == "adafactor" else ScheduleSection(kind="constant", learning_rate=1e-3)
    )
    return TrainingConfig(
        run=RunSection(name="layouts", steps=STEPS),
        model=case.config,
        data=DataSection(train="none", batch_size=ROWS),
        optimizer=OptimizerSection(name=case.optimizer, clip_norm=case.clip_norm, options=options),
        schedule=schedule,
    )


def run_cases(expert: int, cases: list[Case], given: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    mesh = init_mesh(expert, timeout=COLLECTIVE_SECONDS)
    return [train(case, mesh, given.get(case.name)) for case in cases]


def whole_of(seen: list[dict[str, Any]]) -> Outcome:
    """Joins what the ranks saw; everything that must be alike on several of them is."""
    first = seen[0]
    for other in seen[1:]:
        assert other["sums"] == first["sums"]
        assert other["norms"] == first["norms"]
        assert torch.equal(other["statistics"], first["statistics"])
    copies: dict[int, dict[str, Any]] = {}
    for rank in seen:
        copy = copies.setdefault(rank["experts"].start, rank)
        for kind in ("gradients", "weights", "state"):
            for name, tensor in rank[kind].items():
                assert torch.equal(tensor, copy[kind][name]), f"{kind} {name} differs between copies"
    owners = [copies[start] for start in sorted(copies)]

    def joined(kind: str) -> dict[str, Tensor]:
        local = len(first["experts"])
        whole = {}
        for name, tensor in first[kind].items():
            parts = [owner[kind][name] for owner in owners]
            is_split = ".moe.w" in name and tensor.dim() > 0 and tensor.shape[0] == local
            if is_split:
                whole[name] = torch.cat(parts)
            else:
                assert all(torch.equal(part, tensor) for part in parts), f"{kind} {name} differs between ranks"
                whole[name] = tensor
        return whole

    layers = range(len(first["ids"]))
    return Outcome(
        logits=[torch.cat([rank["logits"][layer] for rank in seen]) for layer in layers],
        ids=[torch.cat([rank["ids"][layer] for rank in seen]) for layer in layers],
        positions=[torch.cat([rank["positions"][layer] for rank in seen]) for layer in layers],
        sums=first["sums"],
        statistics=first["statistics"],
        norms=first["norms"],
        gradients=joined("gradients"),
        weights=joined("weights"),
        state=joined("state"),
    )
