"""glam_ext.GLaM: the C++ model as an ordinary ``nn.Module``.

The parameters *are* the C++ tensors, adopted by identity and never copied, so ``state_dict``, optimisers, clipping, DDP,
``.to()``, ``deepcopy`` and pickling work as users expect. One call runs the whole C++ forward. It can therefore not see
what Python puts between the parts: replaced tensors or sub-modules, hooks on children, parametrizations. Each of these is
refused with an error; `glam_ext.functional` is the same model for such edits.

Letters: B sequences, S positions, E experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glam_ext import _C
from glam_ext.config import GLaMConfig

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Loss(NamedTuple):
    """Sums over the tokens of one call; divide by the global number of real tokens."""

    loss_sum: Tensor
    """float32 []: weighted negative log-likelihood, with z-loss and label smoothing as configured."""
    aux: Tensor
    """float32 []: load-balance loss (1 at perfect balance), mean over groups, sum (or mean) over the MoE layers."""
    router_z: Tensor
    """float32 []: sum of logsumexp(router logits)^2 over real tokens and MoE layers."""
    nll: Tensor
    """float32 [B, S]: unweighted, without z-loss."""
    num_tokens: Tensor
    """int64 []: tokens of non-zero weight, or without weights those outside the padding."""
    router_statistics: Tensor
    """int64 [MoE layers, E + 6]: rows of each expert, first and second choices over capacity, tokens with 0, 1 and 2
    rows, real tokens."""


class _Node(nn.Module):
    """A named place in the parameter tree; the computation is the root's."""

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError(
            "glam::GLaM: expected a call of the whole model, got one of a part; glam_ext.functional has the parts"
        )


class GLaM(nn.Module):
    """The model of `config`, initialised from `seed`; on device "meta" nothing is allocated.

    Raises ``ValueError`` for an impossible configuration.
    """

    config: GLaMConfig

    def __init__(self, config: GLaMConfig, *, seed: int = 0, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self._adopt(config, _C.GLaM(config.to_json(), seed, str(device)))

    def _adopt(self, config: GLaMConfig, core: Any) -> None:
        """Mirrors the C++ tree with empty modules and registers its tensors in them."""
        self.config = config
        self.__dict__["_core"] = core
        nodes: dict[str, nn.Module] = {"": self}
        adopted = []
        for path, tensor in core.named_parameters():
            prefix, _, name = path.rpartition(".")
            node = self._node(nodes, prefix)
            tensor._is_param = True  # what isinstance(tensor, nn.Parameter) asks for
            node.register_parameter(name, tensor)
            adopted.append((path, node, name, tensor))
        self.__dict__["_adopted"] = adopted
        self.__dict__["_nodes"] = nodes

    @staticmethod
    def _node(nodes: dict[str, nn.Module], path: str) -> nn.Module:
        if path not in nodes:
            parent, _, name = path.rpartition(".")
            nodes[path] = _Node()
            GLaM._node(nodes, parent).add_module(name, nodes[path])
        return nodes[path]

    # --- the model

    def forward(
        self,
        tokens: Tensor,
        segment_ids: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        seed: int = 0,
        step: int = 0,
        first_token: int = 0,
    ) -> Tensor | Loss:
        """tokens int64 [B, S] -> logits float32 [B, S, V]; with targets int64 [B, S] the `Loss` instead.

        segment_ids: int32 [B, S], equal for tokens that see each other, 0 for padding. weights: float32 [B, S], 0 for
        padding. seed, step and first_token (the index of the first token in the global batch) are the counters of the
        random routing policies and the router's jitter.
        """
        self._check_intact()
        counters = (seed, step, first_token)
        if targets is None:
            return self._core.forward(tokens, segment_ids, counters)
        return Loss(*self._core.loss(tokens, targets, weights, segment_ids, counters))

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **counters: int,
    ) -> Loss:
        """The loss of next-token targets; the arguments are those of `forward`."""
        return self(tokens, segment_ids, targets, weights, **counters)

    def init_cache(self, batch: int, max_len: int) -> list[Tensor]:
        """Zeroed keys and values of each layer in turn, [batch, max_len, H, A] in the compute dtype."""
        return self._core.init_cache(batch, max_len)

    def step(self, tokens: Tensor, cache: list[Tensor], positions: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Appends tokens int64 [B, N] to each row's cache, in place -> logits float32 [B, V] after the last real one.

        positions int32 [B]: index of the first new token, -1 for a finished row. lengths int32 [B]: how many of the N
        are real, all if absent; the rest is padding on the right.
        """
        self._check_intact()
        if lengths is None:
            lengths = torch.full_like(positions, tokens.shape[1])
        return self._core.step(tokens, cache, positions, lengths)

    # --- what an nn.Module promises

    def train(self, mode: bool = True) -> GLaM:
        super().train(mode)
        self._core.train(mode)
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign:
            raise ValueError(
                "glam::GLaM.load_state_dict: expected assign=False, got True: it would replace the tensors that the C++ "
                "model computes with; convert the model with .to(dtype) first and load with assign=False"
            )
        return super().load_state_dict(state_dict, strict)

    def __getstate__(self) -> dict[str, Any]:
        own = {"config", "_core", "_adopted", "_nodes", *nn.Module().__dict__}
        return {
            "config": self.config,
            "training": {path: node.training for path, node in self._nodes.items()},
            "tensors": {path: tensor.detach() for path, _, _, tensor in self._adopted},
            "requires_grad": {path: tensor.requires_grad for path, _, _, tensor in self._adopted},
            "grads": {path: tensor.grad for path, _, _, tensor in self._adopted if tensor.grad is not None},
            "attributes": {name: value for name, value in self.__dict__.items() if name not in own},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        devices = {tensor.device for tensor in state["tensors"].values()}
        self._adopt(state["config"], _C.GLaM(state["config"].to_json(), None, str(devices.pop())))
        for path, _, _, tensor in self._adopted:
            tensor.data = state["tensors"][path]
            tensor.requires_grad_(state["requires_grad"][path])
            tensor.grad = state["grads"].get(path)
        for path, training in state["training"].items():
            self._nodes[path].training = training
        self._core.train(self.training)
        self.__dict__.update(state["attributes"])

    # --- what the C++ forward cannot see

    def _check_intact(self) -> None:
        for path, node, name, tensor in self._adopted:
            if node._parameters.get(name) is not tensor:
                raise RuntimeError(
                    f"glam::GLaM: expected {path} to be the tensor that the C++ model computes with, got another one (as "
                    "FSDP2, functional_call, a parametrization, .to('meta') or a load with assign=True leave behind); "
                    "change it in place, or use glam_ext.functional"
                )
        for path, node in self._nodes.items():
            parent, _, name = path.rpartition(".")
            if path and self._nodes[parent]._modules.get(name) is not node:
                raise RuntimeError(
                    f"glam::GLaM: expected {path} to be as built, got another module in its place, which the C++ forward "
                    "does not call; use glam_ext.functional"
                )
            if node is not self and any(getattr(node, hooks) for hooks in _HOOKS):
                raise RuntimeError(
                    f"glam::GLaM: expected no hook on {path}, got one, which the C++ forward does not call; hook the whole "
                    "model, or use glam_ext.functional"
                )
