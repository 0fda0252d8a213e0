"""GLaMConfig: one schema in two languages, its presets, its errors, and the rules derived from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

from glam_ext import _C
from glam_ext.config import GLaMConfig, preset_names

REQUIRED = {"num_layers": 4, "model_dim": 8, "hidden_dim": 16, "num_heads": 2, "head_dim": 4}

# The paper's table 4: layers, model dim, hidden dim, heads, head dim, experts.
TABLE_4 = {
    "0.1B": (12, 768, 3072, 12, 64, 0),
    "0.1B/64E": (12, 768, 3072, 12, 64, 64),
    "1.7B": (24, 2048, 8192, 16, 128, 0),
    "1.7B/32E": (24, 2048, 8192, 16, 128, 32),
    "1.7B/64E": (24, 2048, 8192, 16, 128, 64),
    "1.7B/128E": (24, 2048, 8192, 16, 128, 128),
    "1.7B/256E": (24, 2048, 8192, 16, 128, 256),
    "8B": (32, 4096, 16384, 32, 128, 0),
    "8B/64E": (32, 4096, 16384, 32, 128, 64),
    "137B": (64, 8192, 65536, 128, 128, 0),
    "64B/64E": (64, 8192, 32768, 128, 128, 64),
}


def make(**fields: object) -> GLaMConfig:
    return GLaMConfig(**{**REQUIRED, **fields})


# --- one schema


def test_both_languages_have_the_same_fields_order_and_defaults():
    in_cpp = json.loads(_C.config_defaults())
    in_python = {field.name: field.default for field in dataclasses.fields(GLaMConfig)}
    assert list(in_cpp) == list(in_python)
    for name, default in in_python.items():
        if default is dataclasses.MISSING:
            assert name in REQUIRED
            assert in_cpp[name] == 0
        else:
            assert (type(in_cpp[name]), in_cpp[name]) == (type(default), default), name


def test_defaults_are_the_published_ones():
    config = make()
    assert config.vocab_size == 256_000
    assert config.capacity_factor == 2.0
    assert config.eval_capacity_factor is None
    assert config.aux_loss_weight == 0.01
    assert config.z_loss == 1e-4
    assert config.second_policy == "all"
    assert config.expert_activation == "relu"
    assert config.attention_extra_logit
    assert config.moe_first


EVERY_FIELD = {
    **REQUIRED,
    "vocab_size": 37,
    "num_experts": 6,
    "moe_first": False,
    "expert_activation": "geglu",
    "tie_embedding": False,
    "attention_extra_logit": False,
    "attention_logit_cap": 50.0,
    "logit_cap": 30.0,
    "z_loss": 0.1,
    "label_smoothing": 0.05,
    "norm_eps": 1e-5,
    "second_policy": "random",
    "second_threshold": 0.5,
    "normalize_before_capacity": False,
    "capacity_factor": 1.25,
    "eval_capacity_factor": 1.0 / 3.0,
    "group_size": 64,
    "aux_loss_weight": 0.02,
    "aux_loss_reduction": "mean",
    "router_z_loss": 0.001,
    "router_jitter": 0.01,
    "router_logit_cap": 10.0,
    "compute_dtype": "float32",
    "recompute": True,
}


def test_json_round_trip_of_every_field_is_exact():
    assert set(EVERY_FIELD) == {field.name for field in dataclasses.fields(GLaMConfig)}
    config = GLaMConfig(**EVERY_FIELD)
    assert config.to_dict() == {field.name: EVERY_FIELD[field.name] for field in dataclasses.fields(GLaMConfig)}
    defaults = {field.name: field.default for field in dataclasses.fields(GLaMConfig)}
    assert all(defaults[name] != value for name, value in EVERY_FIELD.items()), (
        "a field left at its default proves less"
    )
    for indent in (None, 2):
        text = config.to_json(indent)
        assert json.loads(text) == config.to_dict()
        assert GLaMConfig.from_json(text) == config
        assert _C.canonical_config(text, -1 if indent is None else indent) == text
    assert "\n" in config.to_json(2)
    assert "\n" not in config.to_json()


def test_absent_keys_take_their_defaults_in_both_languages():
    assert GLaMConfig.from_json(json.dumps(REQUIRED)) == make() == GLaMConfig.from_dict(REQUIRED)
    assert json.loads(_C.canonical_config(json.dumps(REQUIRED))) == make().to_dict()


def test_values_are_normalised_so_that_equal_configurations_are_equal():
    config = make(capacity_factor=2, num_layers=np.int64(4), z_loss=0)
    assert config == make(capacity_factor=2.0, z_loss=0.0)
    assert type(config.capacity_factor) is float
    assert type(config.num_layers) is int
    assert hash(config) == hash(make(capacity_factor=2.0, z_loss=0.0))


def test_configuration_is_immutable_and_copies():
    config = make(num_experts=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 5  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
    assert dataclasses.replace(config, num_layers=6) == make(num_experts=4, num_layers=6)
    with pytest.raises(ValueError, match="expected num_layers to be between 1"):
        dataclasses.replace(config, num_layers=0)


# --- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 1}, "expected vocab_size to be between 2 and 2147483647, got 1; set vocab_size in that range"),
        ({"num_layers": 0}, "expected num_layers to be between 1 and 2147483647, got 0"),
        ({"model_dim": -8}, "expected model_dim to be between 1 .*, got -8"),
        ({"hidden_dim": 0}, "expected hidden_dim to be between 1 .*, got 0"),
        ({"num_heads": 0}, "expected num_heads to be between 1 .*, got 0"),
        ({"head_dim": 0}, "expected head_dim to be between 1 .*, got 0"),
        ({"num_experts": -1}, "expected num_experts to be between 0 .*, got -1"),
        ({"model_dim": 2**31}, "expected model_dim to be between 1 and 2147483647, got 2147483648"),
        ({"model_dim": 2**31 - 1, "hidden_dim": 2**31 - 1}, "fewer than 9e18 parameters; reduce num_layers, model_dim"),
        ({"num_layers": 2**70}, "expected num_layers to be an integer, got 1.18.*e.21"),
        ({"num_layers": 4.0}, "expected num_layers to be an integer, got 4.0; write it like 64"),
        ({"num_layers": "4"}, 'expected num_layers to be an integer, got "4"'),
        ({"num_layers": True}, "expected num_layers to be an integer, got true"),
        ({"num_layers": None}, "expected num_layers to be an integer, got null"),
        ({"moe_first": 1}, "expected moe_first to be a boolean, got 1; write it like true"),
        ({"z_loss": "small"}, 'expected z_loss to be a finite number, got "small"'),
        ({"z_loss": True}, "expected z_loss to be a finite number, got true"),
        ({"z_loss": float("nan")}, 'expected z_loss to be a finite number, got "nan"'),
        ({"z_loss": -1e-4}, "expected z_loss to be finite and at least 0, got -0.0001; use 0 for none"),
        ({"capacity_factor": float("inf")}, 'expected capacity_factor to be a finite number, got "inf"'),
        ({"capacity_factor": None}, "expected capacity_factor to be a finite number, got null"),
        ({"eval_capacity_factor": "all"}, "expected eval_capacity_factor to be a finite number or null"),
        ({"norm_eps": 0.0}, "expected norm_eps to be finite and above 0, got 0.0; the usual value is 1e-6"),
        ({"label_smoothing": 1.0}, "expected label_smoothing to be at least 0 and below 1, got 1.0"),
        ({"router_jitter": -0.1}, "expected router_jitter to be at least 0 and below 1, got -0.1"),
        ({"logit_cap": -1.0}, "expected logit_cap to be finite and at least 0, got -1.0; use 0 for no cap"),
        ({"attention_logit_cap": -1.0}, "expected attention_logit_cap to be finite and at least 0"),
        ({"router_logit_cap": -1.0}, "expected router_logit_cap to be finite and at least 0"),
        ({"router_z_loss": -1.0}, "expected router_z_loss to be finite and at least 0"),
        ({"aux_loss_weight": -1.0}, "expected aux_loss_weight to be finite and at least 0"),
        (
            {"expert_activation": "swiglu"},
            'expected expert_activation to be one of "relu", "gelu", "geglu", got "swiglu"',
        ),
        ({"second_policy": "top1"}, 'expected second_policy to be one of "all", "random", "sampling", got "top1"'),
        ({"aux_loss_reduction": "max"}, 'expected aux_loss_reduction to be one of "sum", "mean", got "max"'),
        ({"compute_dtype": "float16"}, 'expected compute_dtype to be one of "bfloat16", "float32", got "float16"'),
        ({"compute_dtype": np.float32}, "expected compute_dtype to be one of .*numpy.float32"),
        ({"second_threshold": 0.5}, 'expected second_threshold to be 0 when second_policy is "all", got 0.5; only'),
        (
            {"second_policy": "random", "second_threshold": -0.5},
            "expected second_threshold to be finite and at least 0",
        ),
        ({"group_size": -2}, "expected group_size to be -1 .* 0 .* or a number of tokens, got -2"),
        (
            {"num_experts": 4, "moe_first": False, "num_layers": 1},
            "expected num_layers to be at least 2 when moe_first is false, got 1, .*; set moe_first = true or num_exp",
        ),
    ],
)
def test_impossible_values_name_the_key_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=f"^glam::GLaMConfig: .*{message}"):
        make(**fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"num_layer": 4}', 'unknown key "num_layer"; did you mean num_layers'),
        ('{"dropout": 0.1}', 'unknown key "dropout"; remove it, the keys are vocab_size, num_layers, .*, recompute$'),
        ('{"num_layers": 4, "num_layers": 4}', 'key "num_layers" is given twice; remove one'),
        ('{"num_layers": 4}', "key model_dim is missing; it has no default, set it"),
        ("[1, 2]", r"expected a JSON object of configuration keys, got \[1,2\]"),
        ("", "not JSON"),
        ('{"num_layers": 4', "not JSON"),
        ('{"z_loss": NaN}', "not JSON"),
        ('{"z_loss": 1e999}', "not JSON"),
        ("{'num_layers': 4}", "not JSON"),
    ],
)
def test_bad_json_names_the_key_and_the_fix(text, message):
    with pytest.raises(ValueError, match=f"^glam::GLaMConfig: {message}"):
        GLaMConfig.from_json(text)


def test_text_that_is_not_utf8_is_refused():
    with pytest.raises(ValueError, match="glam::GLaMConfig: not JSON"):
        _C.canonical_config(b'{"second_policy": "\xff"}')


def test_from_dict_names_an_unknown_key():
    with pytest.raises(ValueError, match='unknown key "head_dims"; did you mean head_dim'):
        GLaMConfig.from_dict({**REQUIRED, "head_dims": 4})


# --- presets


def test_presets_are_table_4_with_tiny_and_debug():
    assert preset_names() == ["tiny", "debug", *TABLE_4]
    for name, row in TABLE_4.items():
        config = GLaMConfig.preset(name)
        got = (config.num_layers, config.model_dim, config.hidden_dim, config.num_heads, config.head_dim)
        assert (*got, config.num_experts) == row
        assert config == make(**dict(zip([*REQUIRED, "num_experts"], row, strict=True)))  # nothing else is changed


def test_small_presets():
    tiny = make(num_layers=2, model_dim=64, hidden_dim=256, num_heads=4, head_dim=16, num_experts=4, vocab_size=512)
    debug = make(num_layers=4, model_dim=256, hidden_dim=1024, num_heads=4, head_dim=64, num_experts=8, vocab_size=4096)
    assert GLaMConfig.preset("tiny") == tiny
    assert GLaMConfig.preset("debug") == debug


def test_preset_overrides_and_unknown_names():
    assert GLaMConfig.preset("64B/64E", vocab_size=32_000).vocab_size == 32_000
    with pytest.raises(ValueError, match=r'unknown preset "64B/65E"; the presets are "tiny", .*, "64B/64E"$'):
        GLaMConfig.preset("64B/65E")


# --- derived rules


@pytest.mark.parametrize("num_experts", [0, 1, 2, 5])
@pytest.mark.parametrize("moe_first", [True, False])
@pytest.mark.parametrize("num_layers", [2, 3, 4, 7])
def test_moe_layers(num_experts, moe_first, num_layers):
    config = make(num_experts=num_experts, moe_first=moe_first, num_layers=num_layers)
    layers = [layer for layer in range(num_layers) if config.is_moe_layer(layer)]
    if num_experts < 2:
        assert layers == []
    else:
        assert layers == list(range(0 if moe_first else 1, num_layers, 2))
    assert config.num_moe_layers == len(layers)
    assert _C.moe_layers(config.to_json()) == (len(layers), layers)


@pytest.mark.parametrize(
    ("group_size", "num_experts", "factor", "slots"),
    [
        (1024, 64, 2.0, 32),  # exactly balanced
        (1024, 64, 1.25, 20),
        (1000, 64, 2.0, 32),  # int(31.25) = 31, up to 32
        (100, 64, 2.0, 4),  # int(3.125) = 3
        (64, 64, 2.0, 4),  # int(2) = 2
        (32, 64, 2.0, 1),  # int(1) = 1 stays
        (16, 64, 2.0, 1),  # int(0.5) = 0 gives 1
        (1, 64, 2.0, 1),
        (8, 2, 1.0, 4),
        (9, 2, 1.0, 4),
        (10, 2, 1.0, 8),  # int(5) = 5, up to 8
        (1024, 64, 0.0, -1),
        (1024, 64, -1.0, -1),
        (1024, 1, 2.0, -1),
        (1024, 0, 2.0, -1),
    ],
)
def test_capacity_by_hand(group_size, num_experts, factor, slots):
    training = make(num_experts=num_experts, capacity_factor=factor)
    assert training.capacity(group_size, training=True) == slots
    assert training.capacity(group_size, training=False) == -1  # evaluation drops nothing unless asked to
    evaluation = make(num_experts=num_experts, capacity_factor=0.0, eval_capacity_factor=factor)
    assert evaluation.capacity(group_size, training=False) == slots
    assert evaluation.capacity(group_size, training=True) == -1


def test_capacity_is_the_same_in_both_languages():
    generator = np.random.default_rng(0)
    capped = 0
    for _ in range(500):
        config = make(
            num_experts=int(generator.integers(0, 70)),
            capacity_factor=float(generator.choice([-1.0, 0.1, 0.7, 1.0, 1.1, 1.25, 2.0, 1e30])),
            eval_capacity_factor=generator.choice([None, 0.3, 2.0]),
        )
        group_size, training = int(generator.integers(1, 5000)), bool(generator.integers(2))
        slots = config.capacity(group_size, training)
        assert slots == _C.capacity(config.to_json(), group_size, training)
        assert slots == -1 or slots == 1 or slots % 4 == 0
        capped += slots > 0
    assert capped > 100
