"""glam_ext.GLaM: the C++ model as an ordinary ``nn.Module``.

The parameters *are* the C++ tensors, adopted by identity and never copied, so ``state_dict``, optimisers, clipping,
DDP, ``.to()``, ``deepcopy`` and pickling work as users expect. One call runs the whole C++ forward. It can therefore
not see what Python puts between the parts: replaced tensors or sub-modules, hooks on children, parametrizations. Each
of these is refused with an error; `glam_ext.functional` is the same model for such edits.

Letters: B sequences, S positions, E experts, V vocabulary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glam_ext import _C
from glam_ext.config import GLaMConfig
from glam_ext.counts import is_expert_weight

INFERENCE_DTYPES = {"bfloat16": torch.bfloat16, "int8": torch.int8}
"""Of packed weights (`GLaM.prepare_for_inference`), by name."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ELSEWHERE = "change it in place, or use glam_ext.functional, which computes with whatever tensors it is given"


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


def _inference_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = INFERENCE_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in INFERENCE_DTYPES.values():
        raise ValueError(f'glam::GLaM.prepare_for_inference: expected "bfloat16" or "int8", got {dtype!r}')
    return found


def _size(node: nn.Module) -> int:
    return len(node._parameters) + len(node._buffers) + len(node._modules)


class GLaM(nn.Module):
    """The model of `config`, initialised from `seed`; on device "meta" nothing is allocated.

    With `expert_group`, the name of a process group of P ranks, the experts are spread over its ranks: rank p holds
    experts p E / P to (p + 1) E / P of every MoE layer, `local_experts`, and their weights are [E / P, ...]. Its ranks
    must all make every call. `exchange_chunks` is the number of parts in which rows travel and are computed at once.

    Raises ``ValueError`` for an impossible configuration, ``RuntimeError`` where E is no multiple of the ranks.
    """

    config: GLaMConfig
    layers: nn.ModuleList
    # In __dict__ from the start: nn.Module's own attributes are parameters, buffers and modules.
    _core: Any
    _adopted: list[tuple[str, nn.Module, str, Tensor]]
    _nodes: dict[str, nn.Module]
    _sizes: dict[str, int]
    _parallel: tuple[str, int]

    def __init__(
        self,
        config: GLaMConfig,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        expert_group: str = "",
        exchange_chunks: int = 1,
    ) -> None:
        super().__init__()
        self._parallel = (expert_group, exchange_chunks)
        self._adopt(config, _C.GLaM(config.to_json(), seed, str(device), *self._parallel))

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str], hashes: bool = True, inference: torch.dtype | str | None = None
    ) -> GLaM:
        """The model of a checkpoint folder, or of the newest good one of a run, in eval mode.

        Read by the C++ function that deployed programs use. ``hashes=False`` trusts files whose size is right.
        ``inference``, "bfloat16" or "int8", gives what `prepare_for_inference` would, tensor by tensor from the file:
        the float32 model is never in memory. Raises ``CheckpointError`` naming the file or the tensor that is not as it
        should be.
        """
        core = _C.load_model(path, hashes, None if inference is None else _inference_dtype(inference))
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._parallel = ("", 1)
        model._adopt(GLaMConfig.from_json(core.config()), core)
        return model.eval()

    def _adopt(self, config: GLaMConfig, core: Any) -> None:
        """Mirrors the C++ tree with empty modules and registers its tensors in them."""
        self.config = config
        self.__dict__["_core"] = core
        nodes: dict[str, nn.Module] = {"": self}
        adopted: list[tuple[str, nn.Module, str, Tensor]] = []
        for path, tensor in core.named_parameters():
            prefix, _, name = path.rpartition(".")
            node = self._node(nodes, prefix)
            tensor._is_param = True  # what isinstance(tensor, nn.Parameter) asks for
            node.register_parameter(name, tensor)
            adopted.append((path, node, name, tensor))
        self.__dict__["_adopted"] = adopted
        self.__dict__["_nodes"] = nodes
        self.__dict__["_sizes"] = {path: _size(node) for path, node in nodes.items()}

    @staticmethod
    def _node(nodes: dict[str, nn.Module], path: str) -> nn.Module:
        if path not in nodes:
            parent_path, _, name = path.rpartition(".")
            parent = GLaM._node(nodes, parent_path)
            nodes[path] = nn.ModuleList() if path == "layers" else _Node()
            parent.add_module(name, nodes[path])
        return nodes[path]

    # --- experts over ranks

    @property
    def local_experts(self) -> range:
        """Of each MoE layer, those whose weights are here."""
        first, count = self._core.local_experts()
        return range(first, first + count)

    def expert_parameters(self) -> dict[str, Tensor]:
        """The weights of experts by name, [local experts, ...]; all other parameters are whole on every rank."""
        return {path: tensor for path, _, _, tensor in self._adopted if is_expert_weight(path)}

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
        if self._core.training != self.training:
            self._core.train(self.training)
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
        are real, all if absent; the rest is padding on the right. Inference whatever the mode; threads may step at
        once, each with its cache.
        """
        self._check_intact()
        if lengths is None:
            lengths = torch.full_like(positions, tokens.shape[1])
        return self._core.step(tokens, cache, positions, lengths)

    def prepare_for_inference(self, dtype: torch.dtype | str) -> GLaM:
        """Packs the weights of all products and the embedding in "bfloat16" or "int8", in place; frees the plain ones.

        Decoding then reads each weight of an active expert once, in order. In bfloat16 the results are the bits of the
        model with these weights rounded; int8 has one scale per output column (`glam_ext.ops.pack_weight`). Router,
        norms and biases stay. The parameters keep their names; none wants a gradient, the packed ones have the packed
        shapes. What is left is inference: forward, loss under any mode but without gradients, step, generation, export.
        Raises, and changes nothing: ``ValueError`` unless model_dim, hidden_dim and num_heads * head_dim are multiples
        of 32, ``RuntimeError`` unless all experts are here and the parameters float32 or bfloat16 on the CPU.
        """
        self._check_intact()
        self._core.prepare_for_inference(_inference_dtype(dtype))
        return self.eval()

    # --- what an nn.Module promises

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if assign:
            raise ValueError(
                "glam::GLaM.load_state_dict: expected assign=False, got True: it would replace the tensors that the "
                "C++ model computes with; convert the model with .to(dtype) first and load with assign=False"
            )
        return super().load_state_dict(state_dict, strict)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GLaM:
        """What .to(), .double() and the like do; refuses, before any change, to lose the C++ tensors."""
        future = torch.__future__
        if future.get_overwrite_module_params_on_conversion() or future.get_swap_module_params_on_conversion():
            raise RuntimeError(
                "glam::GLaM: expected parameters to be converted in place, got torch.__future__.set_overwrite_ or "
                "set_swap_module_params_on_conversion(True), which replace the tensors that the C++ model computes "
                "with; set it to False for this conversion"
            )
        first = self._adopted[0][3]
        with torch.no_grad():
            converted = fn(first.new_empty(0))
            changed = any(fn(x.new_empty(0)).dtype != x.dtype for *_, x in self._adopted)
        if self._core.is_prepared and changed:
            raise RuntimeError(
                "glam::GLaM: expected a prepared model to keep its dtypes, got a conversion: packed weights have none "
                "to convert to; convert the model before prepare_for_inference"
            )
        if not torch._has_compatible_shallow_copy_type(first, converted):
            raise RuntimeError(
                f"glam::GLaM: expected a device whose tensors can take the place of {first.device.type} ones, got "
                f"{converted.device.type}; build the model there: GLaM(config, device=...)"
            )
        super()._apply(fn, recurse)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> GLaM:
        """With gradients, requires_grad, attributes and the whole model's hooks; an optimiser in `memo` follows."""
        state = self.__getstate__()
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        state["tensors"] = {path: tensor.clone() for path, tensor in state["tensors"].items()}
        state["grads"] = {path: grad.clone() for path, grad in state["grads"].items()}
        copied._restore(state)
        for (*_, old), (*_, new) in zip(self._adopted, copied._adopted, strict=True):
            memo[id(old)] = new
        for path, node in self._nodes.items():
            memo[id(node)] = copied._nodes[path]
        copied._restore_attributes(copy.deepcopy(state["attributes"], memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self._check_intact()
        built = ("_core", "_adopted", "_nodes", "_sizes", "_modules", "_compiled_call_impl")
        attributes = {name: value for name, value in self.__dict__.items() if name not in built}
        attributes["_modules"] = {name: part for name, part in self._modules.items() if name not in self._nodes}
        paths = {id(tensor): path for path, _, _, tensor in self._adopted}
        own = {name: value for name, value in self._parameters.items() if id(value) not in paths}
        attributes["_parameters"] = own
        return {
            "aliases": {name: paths[id(value)] for name, value in self._parameters.items() if name not in own},
            "config": self.config,
            "tensors": {path: tensor.detach() for path, _, _, tensor in self._adopted},
            "requires_grad": {path: tensor.requires_grad for path, _, _, tensor in self._adopted},
            "grads": {path: tensor.grad for path, _, _, tensor in self._adopted if tensor.grad is not None},
            "attributes": attributes,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state)
        self._restore_attributes(state["attributes"])

    def _restore(self, state: dict[str, Any]) -> None:
        nn.Module.__init__(self)
        device = next(iter(state["tensors"].values())).device
        self._parallel = state["attributes"]["_parallel"]
        self._adopt(state["config"], _C.GLaM(state["config"].to_json(), None, str(device), *self._parallel))
        for path, _, _, tensor in self._adopted:
            tensor.requires_grad_(False).data = state["tensors"][path]  # integers want none
            tensor.requires_grad_(state["requires_grad"][path])
            tensor.grad = state["grads"].get(path)
        for name, path in state["aliases"].items():
            self.register_parameter(name, self.get_parameter(path))

    def _restore_attributes(self, attributes: dict[str, Any]) -> None:
        for registry in ("_modules", "_parameters"):
            self.__dict__[registry].update(attributes.pop(registry))
        self.__dict__.update(attributes)
        for path, node in self._nodes.items():
            if path:
                node.training = self.training

    # --- what the C++ forward cannot see

    def _check_intact(self) -> None:
        for path, node, name, tensor in self._adopted:
            if node._parameters.get(name) is not tensor:
                raise RuntimeError(
                    f"glam::GLaM: expected {path} to be the tensor that the C++ model computes with, got another one "
                    "(as FSDP2, functional_call, a parametrization or a part's load with assign=True leave it); "
                    f"{_ELSEWHERE}"
                )
        for path, node in self._nodes.items():
            if path:
                self._check_part(path, node)

    def _check_part(self, path: str, node: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        if self._nodes[parent]._modules.get(name) is not node:
            found, fix = "another module in its place", "use glam_ext.functional"
        elif any(getattr(node, hooks) for hooks in _HOOKS):
            found, fix = "a hook on it", "hook the whole model, or use glam_ext.functional"
        elif _size(node) != self._sizes[path] or "forward" in vars(node):
            found, fix = "something added to it or removed", "use glam_ext.functional"
        elif node.training != self.training:
            raise RuntimeError(
                f"glam::GLaM: expected {path} to be in {_mode(self)} mode as the whole model, got {_mode(node)}; call "
                "train() or eval() on the whole model"
            )
        else:
            return
        raise RuntimeError(
            f"glam::GLaM: expected {path} to be as built, got {found}, which the C++ forward does not see; {fix}"
        )


def _mode(module: nn.Module) -> str:
    return "training" if module.training else "evaluation"
