"""Parameter counts against the unit-exact published arithmetic, an independent list of shapes, and the built model."""

from __future__ import annotations

import dataclasses
import math

import pytest

from glam_ext.config import GLaMConfig, preset_names
from glam_ext.counts import (
    adafactor_state_elements,
    count_parameters,
    expert_parallel_size,
    flops_per_token,
    is_expert_weight,
    parameter_shapes,
    training_memory,
)
from glam_ext.recipes import inspect_model

# Total and active; None where dense (both are the total).
EXACT_256K = {
    "64B/64E": (1_161_756_418_048, 96_604_528_640),
    "8B/64E": (143_860_731_904, 10_716_745_728),
    "1.7B/64E": (27_302_410_240, 2_337_912_832),
    "0.1B/64E": (2_079_644_928, 324_328_704),
    "137B": (139_537_424_384, None),
    "8B": (9_638_809_600, None),
    "1.7B": (2_135_013_376, None),
    "0.1B": (309_878_016, None),
}
EXACT_32K = {
    "64B/64E": (1_159_921_410_048, 94_769_520_640),
    "8B/64E": (142_943_227_904, 9_799_241_728),
    "1.7B/32E": (13_957_969_920, 1_878_374_400),
    "1.7B/64E": (26_843_658_240, 1_879_160_832),
    "1.7B/128E": (52_615_034_880, 1_880_733_696),
    "1.7B/256E": (104_157_788_160, 1_883_879_424),
    "0.1B/64E": (1_907_612_928, 152_296_704),
    "137B": (137_702_416_384, None),
    "8B": (8_721_305_600, None),
    "1.7B": (1_676_261_376, None),
    "0.1B": (137_846_016, None),
}


@pytest.mark.parametrize(
    ("name", "vocab_size", "total", "active"),
    [(name, 256_000, *counts) for name, counts in EXACT_256K.items()]
    + [(name, 32_000, *counts) for name, counts in EXACT_32K.items()],
)
def test_published_counts_to_the_unit(name, vocab_size, total, active):
    count = count_parameters(GLaMConfig.preset(name, vocab_size=vocab_size))
    assert count.total == total
    assert count.active == (total if active is None else active)


@pytest.mark.parametrize(("experts", "total"), [(16, 548_437_248), (32, 1_001_495_808), (128, 3_719_847_168)])
def test_other_expert_counts_of_the_smallest_model(experts, total):
    assert count_parameters(GLaMConfig.preset("0.1B/64E", num_experts=experts, vocab_size=32_000)).total == total


VARIANTS = {
    "odd layers": {"num_layers": 5},
    "moe second": {"num_layers": 5, "moe_first": False},
    "geglu": {"expert_activation": "geglu"},
    "untied": {"tie_embedding": False},
    "one expert": {"num_experts": 1},
    "odd sizes": {"model_dim": 7, "hidden_dim": 11, "num_heads": 3, "head_dim": 5, "num_experts": 3, "vocab_size": 13},
}


@pytest.mark.parametrize("config", [*preset_names(), *VARIANTS])
def test_parts_equal_the_listed_shapes(config):
    made = GLaMConfig.preset("debug", **VARIANTS[config]) if config in VARIANTS else GLaMConfig.preset(config)
    count = count_parameters(made)
    parts = dict.fromkeys(["attention", "dense_ffn", "experts", "router", "embedding", "norms", "relative_bias"], 0)
    active = 0
    for name, shape in parameter_shapes(made).items():
        if name.endswith("relative_bias"):
            part = "relative_bias"
        elif name.endswith("scale"):
            part = "norms"
        elif name.endswith("router"):
            part = "router"
        else:
            part = {"attention": "attention", "ffn": "dense_ffn", "moe": "experts"}.get(
                name.split(".")[-2], "embedding"
            )
        parts[part] += math.prod(shape)
        active += math.prod(shape) // made.num_experts * 2 if is_expert_weight(name) else math.prod(shape)
    assert dataclasses.asdict(count) == {"total": sum(parts.values()), "active": active, **parts}


def test_flops_of_the_largest_model():
    flops = flops_per_token(GLaMConfig.preset("64B/64E"), context=512)
    assert flops.attention_projections == 68_719_476_736
    assert flops.dense_ffn == 51_539_607_552
    assert flops.experts == 68_719_476_736
    assert flops.router == 33_554_432
    assert flops.logits == 4_194_304_000
    assert flops.attention_scores == 2_147_483_648
    assert flops.total == 195_353_903_104
    weights = flops.total - flops.logits - flops.attention_scores
    assert weights == 2 * (94_506_057_728)  # two per matrix weight that a token meets, 189.0 G


def test_adafactor_state_is_factored_over_the_last_two_dims():
    assert adafactor_state_elements((128, 256)) == 384
    assert adafactor_state_elements((127, 256)) == 127 * 256
    assert adafactor_state_elements((8, 128, 256)) == 8 * 384
    assert adafactor_state_elements((512,)) == 512
    assert adafactor_state_elements((4, 32)) == 128


def test_memory_splits_experts_and_replicates_the_rest():
    config = GLaMConfig.preset("debug")
    count = count_parameters(config)
    one, four = training_memory(config), training_memory(config, devices=4)
    assert one["weights"] == one["gradients"] == 4 * count.total
    assert four["weights"] == 4 * (count.total - count.experts + count.experts // 4)
    assert four["total"] == four["weights"] + four["gradients"] + four["adafactor"]
    assert [expert_parallel_size(config, n) for n in (1, 2, 3, 6, 8, 16)] == [1, 2, 1, 2, 8, 8]
    assert expert_parallel_size(GLaMConfig.preset("0.1B"), 8) == 1


def test_inspect_prints_the_counts_beside_the_paper(capsys):
    assert inspect_model.main(["64B/64E", "--devices", "1024"]) == 0
    text = capsys.readouterr().out
    for expected in ("1,161,756,418,048", "96,604,528,640", "1.2T", "96.6B", "195.4", "180", "1024 devices"):
        assert expected in text, expected


@pytest.mark.parametrize("name", preset_names())
def test_inspect_every_preset(name, capsys):
    assert inspect_model.main([name, "--vocab-size", "32000"]) == 0
    text = capsys.readouterr().out
    assert f"{count_parameters(GLaMConfig.preset(name, vocab_size=32_000)).total:,}" in text


def test_inspect_names_the_known_discrepancy(capsys):
    inspect_model.main(["1.7B/32E"])
    assert "20B" in capsys.readouterr().out
    inspect_model.main(["1.7B/64E"])
    assert "32,000" in capsys.readouterr().out


def test_inspect_refuses_an_unknown_name(capsys):
    assert inspect_model.main(["2B"]) == 1
    assert 'unknown preset "2B"; the presets are' in capsys.readouterr().err
