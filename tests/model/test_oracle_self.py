"""The oracle itself, before it judges anything: counts, limits, and its einsum gate against the loop form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from tests.reference import adafactor, attention, gating, glam, routing


@dataclass(frozen=True)
class Config:
    """GLaMConfig's fields as the oracle reads them, defaults of the preset `tiny`."""

    vocab_size: int = 512
    num_layers: int = 2
    model_dim: int = 64
    hidden_dim: int = 256
    num_heads: int = 4
    head_dim: int = 16
    num_experts: int = 4
    moe_first: bool = True
    expert_activation: str = "relu"
    tie_embedding: bool = True
    attention_extra_logit: bool = True
    attention_logit_cap: float = 0.0
    logit_cap: float = 0.0
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    norm_eps: float = 1e-6
    second_policy: str = "all"
    second_threshold: float = 0.0
    normalize_before_capacity: bool = True
    capacity_factor: float = 2.0
    eval_capacity_factor: float | None = None
    group_size: int = 0
    aux_loss_reduction: str = "sum"
    router_logit_cap: float = 0.0


SMALL = Config(vocab_size=23, num_layers=3, model_dim=10, hidden_dim=14, num_heads=3, head_dim=4, num_experts=5)


def batch(config: Config, rows: int = 2, size: int = 12, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (rows, size + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def count(config: Config) -> int:
    return sum(torch.Size(shape).numel() for shape in glam.parameter_shapes(config).values())


def test_tiny_parameter_count() -> None:
    # embedding 512*64 = 32768; attention 2*(4*64*64) = 32768; bias 2*4*32 = 256; norms (2*2+1)*64 = 320;
    # one dense feed-forward 3*64*256 = 49152; one MoE 4*2*64*256 + 64*4 = 131328.
    assert count(Config()) == 32768 + 32768 + 256 + 320 + 49152 + 131328 == 246592


def test_count_follows_the_formula_of_the_published_table() -> None:
    for moe_first in (True, False):
        c = replace(SMALL, moe_first=moe_first)
        moe = 2 if moe_first else 1
        wide = c.num_heads * c.head_dim
        expected = c.num_layers * 4 * c.model_dim * wide + (3 - moe) * 3 * c.model_dim * c.hidden_dim
        expected += moe * (c.num_experts * 2 * c.model_dim * c.hidden_dim + c.model_dim * c.num_experts)
        expected += c.vocab_size * c.model_dim + 7 * c.model_dim + 32 * c.num_heads * c.num_layers
        assert count(c) == expected


@pytest.mark.parametrize("num_experts", [0, 1])
def test_one_expert_is_the_dense_model(num_experts: int) -> None:
    config = replace(SMALL, num_experts=num_experts)
    assert not any("moe" in name for name in glam.parameter_shapes(config))
    tokens, targets = batch(config)
    output = glam.forward(glam.random_parameters(config), config, tokens, targets)
    assert output.aux == 0
    assert not output.aux_of_layer


def test_identical_geglu_experts_without_drops_equal_the_dense_layer() -> None:
    # With both choices kept the gates sum to (g1 + g2) / (g1 + g2 + 1e-9), so equal experts act as one up to 1e-9.
    moe_config = replace(SMALL, num_layers=1, expert_activation="geglu", capacity_factor=0.0)
    dense_config = replace(moe_config, num_experts=0)
    dense = glam.random_parameters(dense_config)
    sparse = {name: value for name, value in dense.items() if ".ffn." not in name}
    for moe_name, ffn_name in (("wi", "w1"), ("wg", "w0"), ("wo", "wo")):
        weight = dense[f"layers.0.ffn.{ffn_name}"]
        sparse[f"layers.0.moe.{moe_name}"] = weight.expand(SMALL.num_experts, *weight.shape)
    sparse["layers.0.moe.router"] = torch.randn(10, 5, dtype=torch.float64)
    tokens, targets = batch(SMALL)
    a = glam.forward(sparse, moe_config, tokens, targets)
    b = glam.forward(dense, dense_config, tokens, targets)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-7)
    assert a.loss_sum is not None
    assert b.loss_sum is not None
    assert abs(a.loss_sum - b.loss_sum) < 1e-6


def test_aux_is_one_at_perfect_balance() -> None:
    # Token s prefers expert s mod 4 by the same margin: f = 1/4 and, by symmetry, m = 1/4, so aux = 4 * 4 / 16 = 1.
    z_GSE = torch.eye(4, dtype=torch.float64).repeat(1, 3, 1) * 3.0
    _, aux_G, dropped_first, _ = glam.gate(z_GSE, torch.ones(1, 12, dtype=torch.long), None, Config(), 6)
    torch.testing.assert_close(aux_G, torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-12)
    assert dropped_first == 0


def test_logits_are_causal_and_segments_are_separate() -> None:
    config = replace(SMALL, capacity_factor=0.0)
    parameters = glam.random_parameters(config)
    tokens, _ = batch(config)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % config.vocab_size
    a, b = (glam.forward(parameters, config, t).logits for t in (tokens, changed))
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(a[:, 7:], b[:, 7:])

    # A packed row equals its segments run alone: only differences of positions matter.
    segment_ids = torch.tensor([[1] * 5 + [2] * 6 + [0]] * 2)
    packed = glam.forward(parameters, config, tokens, segment_ids=segment_ids).logits
    alone = [glam.forward(parameters, config, tokens[:, s]).logits for s in (slice(0, 5), slice(5, 11))]
    torch.testing.assert_close(packed[:, :11], torch.cat(alone, dim=1), rtol=0, atol=1e-12)


def test_every_option_changes_the_result() -> None:
    tokens, targets = batch(SMALL, size=20)
    parameters = glam.random_parameters(replace(SMALL, expert_activation="geglu", tie_embedding=False))
    noise = {n: torch.rand(40, 5, generator=torch.Generator().manual_seed(n)) for n in range(3)}
    base = glam.forward(parameters, SMALL, tokens, targets)
    assert base.dropped_first + base.dropped_second > 0
    for change in (
        {"expert_activation": "gelu"},
        {"expert_activation": "geglu"},
        {"tie_embedding": False},
        {"attention_extra_logit": False},
        {"attention_logit_cap": 1.0},
        {"logit_cap": 1.0},
        {"z_loss": 0.0},
        {"label_smoothing": 0.1},
        {"norm_eps": 0.1},
        {"second_policy": "sampling"},
        {"normalize_before_capacity": False},
        {"capacity_factor": 0.0},
        {"capacity_factor": 1.0},
        {"group_size": -1},
        {"group_size": 10},
        {"router_logit_cap": 0.5},
    ):
        other = glam.forward(parameters, replace(SMALL, **change), tokens, targets, noise=noise)
        assert other.loss_sum is not None
        assert abs(other.loss_sum - base.loss_sum) > 1e-6, change
    mean = glam.forward(parameters, replace(SMALL, aux_loss_reduction="mean"), tokens, targets)
    torch.testing.assert_close(mean.aux, base.aux / 2)


@pytest.mark.parametrize("policy", ["all", "random", "sampling"])
@pytest.mark.parametrize("normalize_before", [True, False])
@pytest.mark.parametrize("capacity", [-1, 1, 4, 8])
def test_einsum_gate_equals_the_loop_form(policy: str, normalize_before: bool, capacity: int) -> None:
    generator = torch.Generator().manual_seed(capacity + 10)
    tokens, size, experts = 36, 12, 5
    z_TE = 2 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    z_TE[3], z_TE[20] = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0]), torch.tensor([-5e3, 0.0, -6e3, -5e3, -5e3])
    mask_T = torch.rand(tokens, generator=generator) < 0.9
    noise = torch.rand(*((tokens, experts) if policy == "sampling" else (tokens,)), generator=generator)
    config = Config(second_policy=policy, second_threshold=0.5, normalize_before_capacity=normalize_before)
    slow = gating.top2_gating(z_TE, mask_T, noise, size, capacity, policy, 0.5, normalize_before)

    z_TE.requires_grad_()
    combine_GSEC, aux_G, dropped_first, dropped_second = glam.gate(
        z_TE.reshape(3, size, experts), mask_T.reshape(3, size).long(), noise, config, capacity
    )
    expected_GSEC = torch.zeros_like(combine_GSEC)
    for t in range(tokens):
        for k in range(2):
            if slow.positions[t, k] >= 0:
                expected_GSEC[t // size, t % size, slow.expert_ids[t, k], slow.positions[t, k]] += slow.gates[t, k]
    torch.testing.assert_close(combine_GSEC, expected_GSEC, rtol=0, atol=1e-14)
    torch.testing.assert_close(aux_G, slow.aux_loss, rtol=0, atol=1e-13)
    assert (dropped_first, dropped_second) == tuple((slow.positions == gating.OVER_CAPACITY).sum(0).tolist())

    # The formula with fixed decisions has the loop's values and the einsum form's gradient.
    gates_TK, aux2_G = gating.gates_and_aux(z_TE, slow.expert_ids, slow.positions, mask_T, size, normalize_before)
    torch.testing.assert_close(gates_TK, slow.gates, rtol=0, atol=1e-14)
    torch.testing.assert_close(aux2_G, slow.aux_loss, rtol=0, atol=1e-13)
    cotangent_GSEC = torch.randn(combine_GSEC.shape, generator=generator, dtype=torch.float64)
    cotangent_TK = torch.zeros_like(gates_TK)
    for t in range(tokens):
        for k in range(2):
            if slow.positions[t, k] >= 0:
                cotangent_TK[t, k] = cotangent_GSEC[t // size, t % size, slow.expert_ids[t, k], slow.positions[t, k]]
    cotangent_G = torch.randn(3, generator=generator, dtype=torch.float64)
    (a,) = torch.autograd.grad((combine_GSEC * cotangent_GSEC).sum() + (aux_G * cotangent_G).sum(), z_TE)
    (b,) = torch.autograd.grad((gates_TK * cotangent_TK).sum() + (aux2_G * cotangent_G).sum(), z_TE)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_einsum_experts_equal_the_row_by_row_form() -> None:
    generator = torch.Generator().manual_seed(5)
    config = replace(SMALL, expert_activation="geglu")
    p = {name: value for name, value in glam.random_parameters(config).items() if name.startswith("layers.0.moe.")}
    x_TD = torch.randn(24, 10, generator=generator, dtype=torch.float64)
    mask_T = torch.rand(24, generator=generator) < 0.8
    result = glam.moe(x_TD, mask_T, p, "layers.0.moe.", config, 12, 4, None, None)
    g = gating.top2_gating(x_TD @ p["layers.0.moe.router"], mask_T, None, 12, 4)
    weights = [p["layers.0.moe." + name] for name in ("wi", "wo", "wg")]
    for slots in (-1, 4):
        plan = routing.routing_plan(g.expert_ids, g.positions, 5, 12, slots)
        y_TD = routing.moe_mlp(x_TD, g.gates, *plan, *weights, "geglu")
        torch.testing.assert_close(y_TD, result.y_TD, rtol=0, atol=1e-12)
        rows = routing.expert_mlp(routing.dispatch(x_TD, *plan), plan[2], *weights, "geglu")
        torch.testing.assert_close(routing.combine(rows, g.gates, *plan), y_TD, rtol=0, atol=1e-12)
    assert torch.all(y_TD[~mask_T] == 0)


def test_oracle_gradients_by_finite_differences() -> None:
    config = replace(SMALL, num_layers=2, model_dim=6, hidden_dim=4, num_heads=2, head_dim=3, vocab_size=11)
    tokens, targets = batch(config, rows=1, size=8)
    segment_ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0]])
    parameters = glam.random_parameters(config, seed=3)
    names = list(parameters)

    def total(*values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, values, strict=True))
        output = glam.forward(named, config, tokens, targets, segment_ids != 0, segment_ids)
        assert output.loss_sum is not None
        return output.loss_sum + 0.01 * output.aux

    values = [parameters[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(total, values, fast_mode=True)


def test_buckets_against_the_logarithmic_rule() -> None:
    # Bucket of n >= 16: 16 + floor(16 * ln(n / 16) / ln(8)), the largest b with (n / 16)^16 >= 8^(b - 16); integers.
    for n in range(300):
        expected = n if n < 16 else min(31, max(b for b in range(16, 200) if n**16 >= 8 ** (b - 16) * 16**16))
        assert attention.bucket(n) == expected, n


def test_attention_forms_agree_and_the_extra_logit_has_its_value() -> None:
    # One key with logit 0 and the extra logit 0: half of v.
    one = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    half = attention.relative_attention(one, one, one + 3.0, torch.zeros(1, 32))
    assert half.item() == 1.5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(3, 32, generator=generator, dtype=torch.float64)
    whole = attention.relative_attention(q, k, v, bias, None, True, 2.0)
    caches = [torch.zeros(2, 9, 3, 4, dtype=torch.float64) for _ in range(2)]
    start = 0
    for stop in (4, 5, 7):
        new = (x[:, start:stop] for x in (q, k, v))
        positions = torch.full((2,), start, dtype=torch.int32)
        part, *caches = attention.relative_attention_step(*new, *caches, positions, bias, True, 2.0)
        torch.testing.assert_close(part, whole[:, start:stop], rtol=0, atol=1e-13)
        start = stop


@pytest.mark.parametrize(
    ("group_size", "factor", "experts", "expected"),
    [(1024, 2.0, 64, 32), (8, 2.0, 64, 1), (16, 1.0, 8, 4), (20, 2.0, 8, 8), (12, 1.25, 5, 4), (7, 0.0, 2, -1)],
)
def test_capacity_rounding(group_size: int, factor: float, experts: int, expected: int) -> None:
    # int(1024*2/64) = 32; int(0.25) = 0 -> 1; 2 -> 4; 5 -> 8; 3 -> 4; factor 0 drops nothing.
    assert gating.capacity_of(group_size, factor, experts) == expected


@pytest.mark.parametrize("shape", [(7,), (5, 4), (3, 6, 5)])
def test_adafactor_reference_equals_torch_where_the_definitions_agree(shape: tuple[int, ...]) -> None:
    # torch.optim.Adafactor factors every matrix over its last two dimensions and takes min(lr, 1/sqrt(t)) = lr here.
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Adafactor([theirs], lr=0.01, beta2_decay=-0.8, eps=(None, 1e-3), d=1.0, weight_decay=0.0)
    ours = adafactor.Adafactor(weight, min_factored=1)
    for step in range(4):
        theirs.grad = 10.0**-step * torch.randn(shape, generator=generator, dtype=torch.float64)
        optimizer.step()
        ours.update(theirs.grad, adafactor.learning_rate(step))
        torch.testing.assert_close(ours.weight, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_adafactor_first_step_by_hand() -> None:
    # At step 0 the decay is 0, so u = grad / |grad| = (1, -1), RMS(u) = 1; the step is 0.01 * RMS(w) = 0.01 * 5.
    state = adafactor.Adafactor(torch.tensor([7.0, 1.0]))
    state.update(torch.tensor([2.0, -3.0]), adafactor.learning_rate(0))
    torch.testing.assert_close(state.weight, torch.tensor([6.95, 1.05], dtype=torch.float64))
    assert adafactor.learning_rate(40_000) == 0.005
    assert [adafactor.is_factored(s) for s in ((128, 128), (4, 128, 300), (127, 500), (200,))] == [
        True,
        True,
        False,
        False,
    ]
