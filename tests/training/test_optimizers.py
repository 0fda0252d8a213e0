"""The update: schedules by configuration, clipping, and a gradient that is not finite, which changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from glam_ext.model import GLaM
from glam_ext.training import ConfigError
from glam_ext.training.optimizers import Updater, make_updater

COSINE = ("--schedule.kind=cosine", "--schedule.learning_rate=1e-2")
OPTIMIZERS = {
    "adafactor-glam": ("--optimizer.name=adafactor", "--schedule.kind=glam", "--schedule.learning_rate=0",
                       "--schedule.warmup_steps=0"),
    "adafactor-cosine": ("--optimizer.name=adafactor", *COSINE),
    "adamw": ("--optimizer.name=AdamW", "--optimizer.options.weight_decay=0.1", *COSINE),
    "adamw-not-fused": ("--optimizer.name=adamw", "--optimizer.options.foreach=true", *COSINE),
    "sgd": ("--optimizer.name=SGD", *COSINE),
    "sgd-momentum": ("--optimizer.name=sgd", "--optimizer.options.momentum=0.9", *COSINE),
    "rmsprop": ("--optimizer.name=rmsprop", *COSINE),
    "nadam": ("--optimizer.name=nadam", *COSINE),
    "adagrad": ("--optimizer.name=adagrad", *COSINE),
}  # fmt: skip


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def make(request, make_config):
    """A model and an updater, always the same."""

    def build() -> tuple[GLaM, Updater]:
        config = make_config(*request.param)
        model = GLaM(config.model, seed=1)
        return model, make_updater(config, model)

    return build


def set_gradients(model: GLaM, step: int, poison: float | None = None) -> None:
    for index, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1
    if poison is not None:
        parameter.grad.view(-1)[-1] = poison


def everything(model: GLaM, updater: Updater) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in {**model.state_dict(), **updater.state_tensors()}.items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_an_update_moves_every_parameter_and_clears_the_gradients(make):
    model, updater = make()
    before = everything(model, updater)
    set_gradients(model, 0)
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    assert float(updater.update(0)) == pytest.approx(expected, rel=1e-6)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.grad is None
    assert updater.skipped == 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(make, poison):
    model, updater = make()
    set_gradients(model, 0)
    updater.update(0)
    before = everything(model, updater)
    set_gradients(model, 1, poison)
    updater.update(1)
    assert_same(everything(model, updater), before)
    assert updater.skipped == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_skipped_updates_leave_no_trace_in_later_ones(make):
    """First, middle and last updates poisoned; the applied ones give what they give alone."""
    model, updater = make()
    for step, poison in enumerate((math.nan, None, math.inf, None, math.nan)):
        set_gradients(model, step, poison)
        updater.update(step)
    assert updater.skipped == 3
    alone, alone_updater = make()
    for step in (1, 3):
        set_gradients(alone, step)
        alone_updater.update(step)
    assert_same(everything(model, updater), everything(alone, alone_updater))


def test_the_state_comes_back(make):
    model, updater = make()
    for step in range(2):
        set_gradients(model, step)
        updater.update(step)
    other, other_updater = make()
    other.load_state_dict(model.state_dict())
    other_updater.load_state({name: tensor.clone() for name, tensor in updater.state_tensors().items()}, 4)
    assert other_updater.skipped == 4
    for step in (2, 3):
        for m, u in ((model, updater), (other, other_updater)):
            set_gradients(m, step)
            u.update(step)
    assert_same(everything(other, other_updater), everything(model, updater))


def test_clipping_bounds_the_gradient_and_not_the_reported_norm(make_config):
    def sgd_steps(clip: float) -> tuple[float, dict[str, torch.Tensor]]:
        config = make_config("--optimizer.name=sgd", "--schedule.kind=constant", "--schedule.learning_rate=1",
                             "--schedule.warmup_steps=0", f"--optimizer.clip_norm={clip}")  # fmt: skip
        model = GLaM(config.model, seed=1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        updater = make_updater(config, model)
        set_gradients(model, 0)
        norm = float(updater.update(0))
        return norm, {name: before[name] - p.detach() for name, p in model.named_parameters()}

    norm, free = sgd_steps(0.0)
    clipped_norm, clipped = sgd_steps(norm / 4)
    loose_norm, loose = sgd_steps(norm * 4)
    assert norm == clipped_norm == loose_norm
    for name, change in free.items():
        torch.testing.assert_close(clipped[name], change / 4, rtol=1e-4, atol=1e-6)
        assert torch.equal(loose[name], change)


def rates(make_config, steps, *overrides: str) -> list[float]:
    config = make_config("--run.steps=100", "--optimizer.name=sgd", *overrides)
    updater = make_updater(config, GLaM(config.model))
    return [updater.learning_rate(step) for step in steps]


def test_schedules_are_those_of_the_configuration(make_config):
    glam = ("--schedule.kind=glam", "--schedule.learning_rate=0", "--schedule.warmup_steps=0")
    assert rates(make_config, [0, 10_000, 40_000], *glam) == pytest.approx([0.01, 0.01, 0.005], rel=1e-12)
    glam = (*glam, "--schedule.multiplier=3", "--schedule.constant_steps=4")
    assert rates(make_config, [0, 4, 9], *glam) == pytest.approx([1.5, 1.5, 1.0], rel=1e-12)
    warm = ("--schedule.learning_rate=0.8", "--schedule.warmup_steps=4")
    constant = rates(make_config, [0, 1, 3, 4, 99], *warm, "--schedule.kind=constant")
    assert constant == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])
    root = rates(make_config, [0, 3, 15, 63], *warm, "--schedule.kind=inverse_sqrt")
    assert root == pytest.approx([0.2, 0.8, 0.4, 0.2])
    cosine = rates(make_config, [0, 4, 52, 100], *warm, "--schedule.kind=cosine", "--schedule.final_fraction=0.5")
    assert cosine == pytest.approx([0.2, 0.8, 0.6, 0.4])


def test_the_learning_rate_reaches_the_optimiser(make_config):
    config = make_config("--optimizer.name=sgd", "--schedule.kind=constant", "--schedule.learning_rate=0.5",
                         "--schedule.warmup_steps=2", "--optimizer.clip_norm=0")  # fmt: skip
    model = GLaM(config.model, seed=1)
    updater = make_updater(config, model)
    for step, rate in enumerate((0.25, 0.5, 0.5)):
        before = model.get_parameter("embedding.weight").detach().clone()
        set_gradients(model, step)
        gradient = model.get_parameter("embedding.weight").grad.clone()
        updater.update(step)
        expected = before - rate * gradient
        torch.testing.assert_close(model.get_parameter("embedding.weight").detach(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimizer.name=adamx"], r'optimizer.name: expected one of .*adamw.*, got "adamx"'),
        (["--optimizer.name=lbfgs"], r'optimizer.name: "lbfgs" cannot be used, it needs a closure; use "adamw"'),
        (["--optimizer.options.lr=1"], r"optimizer.options.lr: is given by schedule.learning_rate; remove it here"),
        (["--optimizer.options.wd=1"], r'optimizer.options.wd: "adamw" has no such option; it takes amsgrad, betas'),
        (["--optimizer.options.betas=[2, 3]"], r"torch.optim.AdamW: Invalid beta"),
        (["--optimizer.name=adafactor", "--optimizer.options.decay=1.0"], r"Adafactor: expected decay < 0"),
        (["--optimizer.name=adafactor", "--optimizer.options.beta=1"], r'"adafactor" has no such option; it takes'),
    ],
)
def test_mistakes_are_named(make_config, overrides, message):
    config = make_config(*overrides)
    with pytest.raises(ConfigError, match=message):
        make_updater(config, GLaM(config.model, device="meta"))
