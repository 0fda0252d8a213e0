"""GLaMConfig: every choice that makes a GLaM model.

The same fields, order, defaults and JSON as the C++ struct ``glam::GLaMConfig`` (glam/config.h). Validation is the C++
function alone, so a configuration that one language accepts the other accepts too. Presets: table 4 of the paper
(arXiv 2112.06905), and ``tiny`` and ``debug`` for tests and demonstrations.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from typing import Any

from glam_ext import _C

_CAPACITY_MULTIPLE = 4
_LARGEST_SIZE = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLaMConfig:
    """A validated, immutable model configuration.

    Construction raises ``ValueError`` with the name of the field and the fix for a wrong type or an impossible value.
    ``dataclasses.replace(config, num_layers=2)`` gives a changed copy, validated again.
    """

    vocab_size: int = 256000  # the paper's text; the small rows of its table 4 were counted with 32,000
    num_layers: int
    model_dim: int
    hidden_dim: int  # of the dense feed-forward and of every expert alike
    num_heads: int
    head_dim: int  # num_heads * head_dim need not equal model_dim
    num_experts: int = 0  # 0 or 1: the dense model
    moe_first: bool = True  # experts in layers 0, 2, 4, ...; False: in 1, 3, 5, ...
    expert_activation: str = "relu"  # relu | gelu | geglu
    tie_embedding: bool = True
    attention_extra_logit: bool = True  # one more logit, 0, in every attention softmax
    attention_logit_cap: float = 0.0  # c * tanh(x / c); 0: none
    logit_cap: float = 0.0
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    norm_eps: float = 1e-6
    second_policy: str = "all"  # all | random | sampling
    second_threshold: float = 0.0
    normalize_before_capacity: bool = True
    capacity_factor: float = 2.0  # slots per token while training; <= 0: nothing is dropped
    eval_capacity_factor: float | None = None  # None: nothing is dropped
    group_size: int = 0  # 0: one sequence; -1: the whole micro-batch; otherwise tokens
    aux_loss_weight: float = 0.01
    aux_loss_reduction: str = "sum"  # sum | mean over the MoE layers
    router_z_loss: float = 0.0
    router_jitter: float = 0.0
    router_logit_cap: float = 0.0
    compute_dtype: str = "bfloat16"  # bfloat16 | float32
    recompute: bool = False

    def __post_init__(self) -> None:
        checked = json.loads(_C.canonical_config(_json_text(self.to_dict())))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GLaMConfig:
        """The preset called ``name`` (see :func:`preset_names`), with some fields replaced."""
        return cls(**{**json.loads(_C.preset_config(name)), **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GLaMConfig:
        """As the constructor, but unknown and missing keys are ``ValueError`` with the nearest known name."""
        return cls.from_json(_json_text(values))

    @classmethod
    def from_json(cls, text: str) -> GLaMConfig:
        """Reads :meth:`to_json` or a part of it; keys with a default may be absent."""
        return cls(**json.loads(_C.canonical_config(text)))

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_json(self, indent: int | None = None) -> str:
        """All fields in order, as the C++ ``to_json`` writes them."""
        return str(_C.canonical_config(_json_text(self.to_dict()), -1 if indent is None else indent))

    def is_moe_layer(self, layer: int) -> bool:
        return self.num_experts > 1 and layer % 2 == (0 if self.moe_first else 1)

    @property
    def num_moe_layers(self) -> int:
        if self.num_experts <= 1:
            return 0
        return (self.num_layers + 1) // 2 if self.moe_first else self.num_layers // 2

    # In Python, not through _C: torch.compile traces the model's call.
    def capacity(self, group_size: int, training: bool) -> int:
        """Slots of one expert in a routing group of ``group_size`` tokens, padding counted; -1: nothing is dropped.

        int(group_size * factor / num_experts), at least 1, rounded up to a multiple of 4 when above 1.
        """
        factor = self.capacity_factor if training else (self.eval_capacity_factor or 0.0)
        if self.num_experts <= 1 or factor <= 0.0:
            return -1
        slots = int(min(group_size * factor / self.num_experts, float(_LARGEST_SIZE - _CAPACITY_MULTIPLE)))
        if slots <= 1:
            return 1
        return -(-slots // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE


def preset_names() -> list[str]:
    """``tiny``, ``debug``, then the eleven rows of table 4 as printed, ``0.1B`` to ``64B/64E``."""
    return list(_C.preset_names())


def _json_text(values: dict[str, Any]) -> str:
    return json.dumps({key: _json_value(value) for key, value in values.items()}, default=repr)


def _json_value(value: Any) -> Any:
    """What JSON cannot hold becomes its text, which the C++ validation then refuses by the name of its field."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return repr(value)
