"""GLaM as functions of its parameters, over the ops of the library: the model's wiring as one readable text.

What `torch.compile`, `torch.export`, hooks, LoRA and research edits use; it equals `glam_ext.GLaM` bit for bit. The
part between the two marker lines is also the source of the exported TorchScript module, so it keeps to TorchScript's
subset of Python: plain functions, a dict of tensors named as in `GLaM.state_dict()`, and the settings in `Options`.

Letters: B sequences, S positions, N new positions of a step, T = B * S tokens, D model dim, F hidden dim, H heads,
A head dim, E experts, V vocabulary. Activations are in the compute dtype (float64 for a float64 model); router,
softmaxes and losses in float32.
Sources: GLaM (arXiv 2112.06905) section 3; google/praxis glam.py and tensorflow/lingvo gshard_builder.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Dict, List, NamedTuple, Optional, Tuple  # noqa: UP035 (TorchScript's names)

import torch
from torch import Tensor

from .config import GLaMConfig


class Options(NamedTuple):
    """The fields of GLaMConfig that the computation reads, in types that TorchScript knows.

    A capacity factor <= 0 drops nothing. The experts are spread over the expert_ranks ranks of the process group named
    expert_group, in order; "" is one process with all of them. exchange_chunks: see `ops.exchange_mlp`.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_experts: int
    moe_first: bool
    expert_activation: str
    tie_embedding: bool
    attention_extra_logit: bool
    attention_logit_cap: float
    logit_cap: float
    z_loss: float
    label_smoothing: float
    norm_eps: float
    second_policy: str
    second_threshold: float
    normalize_before_capacity: bool
    capacity_factor: float
    eval_capacity_factor: float
    group_size: int
    aux_loss_reduction: str
    router_jitter: float
    router_logit_cap: float
    compute_dtype: str
    expert_group: str
    expert_ranks: int
    exchange_chunks: int


def options_of(config: GLaMConfig, expert_group: str = "", expert_ranks: int = 1, exchange_chunks: int = 1) -> Options:
    """The Options of a configuration, for one process or for the ranks of an expert-parallel group."""
    values: Dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(config).items() if name in Options._fields
    }
    values["eval_capacity_factor"] = config.eval_capacity_factor or 0.0
    return Options(**values, expert_group=expert_group, expert_ranks=expert_ranks, exchange_chunks=exchange_chunks)


# --- begin


def is_moe_layer(layer: int, options: Options) -> bool:
    """MoE layers are 0, 2, 4, ... (or 1, 3, 5, ... without moe_first); one expert is the dense model."""
    return options.num_experts > 1 and (layer % 2 == 0) == options.moe_first


def capacity(group_size: int, factor: float, num_experts: int) -> int:
    """Slots of an expert in a group: int(S * factor / E), at least 1, else rounded up to 4; -1 drops nothing."""
    if factor <= 0.0:
        return -1
    slots = int(group_size * factor / num_experts)
    if slots <= 1:
        return 1
    return (slots + 3) // 4 * 4


def embed(tokens: Tensor, parameters: Dict[str, Tensor], options: Options) -> Tensor:
    """tokens int64 [B, S] -> [B, S, D] in the compute dtype; no sqrt(D) scale."""
    x = torch.ops.glam.embedding(tokens, parameters["embedding.weight"])
    return torch.ops.glam.to_compute_dtype(x, options.compute_dtype)


def attention_inputs(
    x_BSD: Tensor, prefix: str, parameters: Dict[str, Tensor], options: Options
) -> Tuple[Tensor, Tensor, Tensor]:
    """Pre-norm and the projections to q, k, v [B, S, H, A]."""
    h = torch.ops.glam.rms_norm(x_BSD, parameters[prefix + "attention_norm.scale"], options.norm_eps)
    shape = [x_BSD.size(0), x_BSD.size(1), options.num_heads, options.head_dim]
    q = torch.ops.glam.linear(h, parameters[prefix + "attention.q"]).view(shape)
    k = torch.ops.glam.linear(h, parameters[prefix + "attention.k"]).view(shape)
    v = torch.ops.glam.linear(h, parameters[prefix + "attention.v"]).view(shape)
    return q, k, v


def attention_layer(
    x_BSD: Tensor, segment_ids: Optional[Tensor], prefix: str, parameters: Dict[str, Tensor], options: Options
) -> Tensor:
    """x + attention(norm(x)), causal within segments."""
    q, k, v = attention_inputs(x_BSD, prefix, parameters, options)
    heads = torch.ops.glam.relative_attention(
        q,
        k,
        v,
        parameters[prefix + "attention.relative_bias"],
        segment_ids,
        options.attention_extra_logit,
        options.attention_logit_cap,
    )
    return x_BSD + torch.ops.glam.linear(heads.flatten(2), parameters[prefix + "attention.o"])


def dense_layer(x_BSD: Tensor, prefix: str, parameters: Dict[str, Tensor], options: Options) -> Tensor:
    """x + geglu(norm(x))."""
    h = torch.ops.glam.rms_norm(x_BSD, parameters[prefix + "ffn_norm.scale"], options.norm_eps)
    w0, w1 = parameters[prefix + "ffn.w0"], parameters[prefix + "ffn.w1"]
    return x_BSD + torch.ops.glam.geglu_mlp(h, w0, w1, parameters[prefix + "ffn.wo"])


def router_logits(
    h_TD: Tensor, router_DE: Tensor, layer: int, options: Options, training: bool, random: List[int]
) -> Tensor:
    """[T, E] in float32 (float64 for a float64 model), with jitter in training and the cap where configured."""
    h = h_TD
    if training and options.router_jitter > 0.0:
        index = torch.arange(h.numel(), device=h.device).view(h.shape) + random[2] * h.size(1)
        stream = (random[1] * options.num_layers + layer) * 2 + 1
        uniform = torch.ops.glam.counter_uniform(random[0], stream, index)
        wide = torch.ops.glam.to_compute_dtype(h, "float32")
        h = wide * (1.0 + options.router_jitter * (2.0 * uniform - 1.0))
    z_TE = torch.ops.glam.router_logits(h, router_DE)
    if options.router_logit_cap > 0.0:
        z_TE = options.router_logit_cap * torch.tanh(z_TE / options.router_logit_cap)
    return z_TE


def routing_noise(z_TE: Tensor, layer: int, options: Options, training: bool, random: List[int]) -> Optional[Tensor]:
    """Uniform numbers of the random ([T]) and sampling ([T, E]) policies; they act in training only."""
    if not training or options.second_policy == "all":
        return None
    stream = (random[1] * options.num_layers + layer) * 2
    if options.second_policy == "random":
        index = torch.arange(z_TE.size(0), device=z_TE.device) + random[2]
    else:
        index = torch.arange(z_TE.numel(), device=z_TE.device).view(z_TE.shape) + random[2] * z_TE.size(1)
    return torch.ops.glam.counter_uniform(random[0], stream, index)


def expert_place(expert_ids: Tensor, options: Options) -> Tensor:
    """The place of each expert in the order (chunk, rank, expert of the chunk), in which `exchange_mlp` wants rows."""
    if options.exchange_chunks == 1:
        return expert_ids
    experts = torch.arange(options.num_experts, dtype=expert_ids.dtype, device=expert_ids.device)
    place = experts.view(options.exchange_chunks, options.expert_ranks, -1).transpose(0, 1).flatten()
    return place[expert_ids.to(torch.long)]


def exchanged_experts(
    h_TD: Tensor,
    gates_TK: Tensor,
    ids_TK: Tensor,
    positions_TK: Tensor,
    group_size: int,
    slots: int,
    wi: Tensor,
    wo: Tensor,
    wg: Optional[Tensor],
    options: Options,
) -> Tensor:
    """`moe_mlp` with the experts of all ranks of the group; wi, wo and wg are those of this rank.

    With slots >= 0 every expert gets that many rows of each routing group, so all ranks send equally many and the host
    need not know how many are used. Dropless, the counts go first and the host waits for them: the layer's only wait.
    """
    places_TK = expert_place(ids_TK, options)
    row_of_choice, choice_of_row, offsets = torch.ops.glam.routing_plan(
        places_TK, positions_TK, options.num_experts, group_size, slots
    )
    rows_RD = torch.ops.glam.dispatch(h_TD, row_of_choice, choice_of_row, offsets)
    segments = offsets  # with slots: what is received lies as what was sent
    out_splits: List[int] = []
    in_splits: List[int] = []
    if slots < 0:
        chunks, ranks = options.exchange_chunks, options.expert_ranks
        rows_of_expert = (offsets[1:] - offsets[:-1]).view(chunks, ranks, -1).transpose(0, 1).flatten()
        ends = torch.cat([rows_of_expert[:1] * 0, rows_of_expert]).cumsum(0).to(torch.int32)
        counts = torch.ops.glam.exchange_counts(ends, options.expert_group)
        counts = counts.view(2, ranks, chunks, -1).transpose(1, 2)  # sent and received, chunk, rank, expert
        sent_and_received: List[int] = counts.sum(3).flatten().to(torch.long).tolist()
        in_splits = sent_and_received[: chunks * ranks]
        out_splits = sent_and_received[chunks * ranks :]
        received = counts[1].flatten()
        segments = torch.cat([received[:1] * 0, received]).cumsum(0).to(torch.int32)
    out_RD = torch.ops.glam.exchange_mlp(
        rows_RD,
        segments,
        out_splits,
        in_splits,
        wi,
        wo,
        wg,
        options.expert_activation,
        options.expert_group,
        options.exchange_chunks,
    )
    return torch.ops.glam.combine(out_RD, gates_TK, row_of_choice, choice_of_row, offsets)


def check_equal_batches(tokens: Tensor, options: Options, training: bool) -> None:
    """Capped routing sends equal splits: every rank of the expert group needs as many tokens as the others."""
    factor = options.capacity_factor if training else options.eval_capacity_factor
    if options.expert_group == "" or factor <= 0.0:
        return
    ends = torch.arange(options.expert_ranks + 1, dtype=torch.int32, device=tokens.device) * tokens.numel()
    counts = torch.ops.glam.exchange_counts(ends, options.expert_group)
    torch._assert_async(
        (counts[0] == counts[1]).all(),
        "glam::GLaM: expected the same number of tokens, padding included, on every rank of the expert group with "
        "capped routing, got different ones; pad the batches to one shape, or set capacity_factor to drop nothing",
    )


def moe_layer(
    x_BSD: Tensor,
    token_mask: Optional[Tensor],
    layer: int,
    prefix: str,
    parameters: Dict[str, Tensor],
    options: Options,
    training: bool,
    random: List[int],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + moe(norm(x)); also aux [], router_z [] and the router statistics int64 [E + 6].

    token_mask: bool [T], true for real tokens. A routing group is options.group_size tokens: 0 one sequence, -1 all.
    """
    h = torch.ops.glam.rms_norm(x_BSD, parameters[prefix + "ffn_norm.scale"], options.norm_eps)
    h_TD = h.flatten(0, 1)
    z_TE = router_logits(h_TD, parameters[prefix + "moe.router"], layer, options, training, random)
    group_size = options.group_size
    if group_size == 0:
        group_size = x_BSD.size(1)
    if group_size == -1:
        group_size = h_TD.size(0)
    factor = options.capacity_factor if training else options.eval_capacity_factor
    slots = capacity(group_size, factor, options.num_experts)
    noise = routing_noise(z_TE, layer, options, training, random)
    gates_TK, ids_TK, positions_TK, aux_G = torch.ops.glam.top2_gating(
        z_TE,
        token_mask,
        noise,
        group_size,
        slots,
        options.second_policy if training else "all",
        options.second_threshold,
        options.normalize_before_capacity,
    )
    wi, wo = parameters[prefix + "moe.wi"], parameters[prefix + "moe.wo"]
    wg: Optional[Tensor] = None
    if options.expert_activation == "geglu":
        wg = parameters[prefix + "moe.wg"]
    if options.expert_group != "":
        y_TD = exchanged_experts(h_TD, gates_TK, ids_TK, positions_TK, group_size, slots, wi, wo, wg, options)
    else:
        row_of_choice, choice_of_row, offsets = torch.ops.glam.routing_plan(ids_TK, positions_TK, options.num_experts)
        y_TD = torch.ops.glam.moe_mlp(
            h_TD, gates_TK, row_of_choice, choice_of_row, offsets, wi, wo, wg, options.expert_activation
        )
    lse_T = torch.logsumexp(z_TE, 1)
    if token_mask is not None:
        lse_T = torch.where(token_mask, lse_T, torch.zeros_like(lse_T))
    statistics = torch.ops.glam.router_statistics(ids_TK, positions_TK, options.num_experts)
    return x_BSD + y_TD.view(x_BSD.shape), aux_G.mean(), torch.ops.glam.ordered_sum(lse_T * lse_T), statistics


def hidden_states(
    tokens: Tensor,
    segment_ids: Optional[Tensor],
    parameters: Dict[str, Tensor],
    options: Options,
    training: bool,
    random: List[int],
) -> Tuple[Tensor, List[Tensor], List[Tensor], List[Tensor]]:
    """The final norm's output [B, S, D], and of each MoE layer aux, router_z and the router statistics."""
    assert tokens.dim() == 2, "glam::GLaM: expected tokens to be [B, S], got " + str(list(tokens.shape))
    check_equal_batches(tokens, options, training)
    x_BSD = embed(tokens, parameters, options)
    token_mask: Optional[Tensor] = None
    if segment_ids is not None:
        token_mask = segment_ids.flatten() != 0
    aux: List[Tensor] = []
    router_z: List[Tensor] = []
    statistics: List[Tensor] = []
    for layer in range(options.num_layers):
        prefix = "layers." + str(layer) + "."
        x_BSD = attention_layer(x_BSD, segment_ids, prefix, parameters, options)
        if is_moe_layer(layer, options):
            x_BSD, aux_n, router_z_n, statistics_n = moe_layer(
                x_BSD, token_mask, layer, prefix, parameters, options, training, random
            )
            aux.append(aux_n)
            router_z.append(router_z_n)
            statistics.append(statistics_n)
        else:
            x_BSD = dense_layer(x_BSD, prefix, parameters, options)
    h_BSD = torch.ops.glam.rms_norm(x_BSD, parameters["final_norm.scale"], options.norm_eps)
    return h_BSD, aux, router_z, statistics


def output_table(parameters: Dict[str, Tensor], options: Options) -> Tensor:
    """[V, D], or packed for inference: the embedding itself when tied."""
    if options.tie_embedding:
        return parameters["embedding.weight"]
    return parameters["output.weight"]


def output_logits(h: Tensor, parameters: Dict[str, Tensor], options: Options) -> Tensor:
    """[..., D] -> float32 [..., V]: scaled by D^-0.5, capped where configured."""
    table = output_table(parameters, options)
    if table.dim() == 2:  # what is packed is the transposed table
        table = table.t()
    logits = torch.ops.glam.linear_wide(h, table).mul_(float(h.size(-1)) ** -0.5)
    if options.logit_cap > 0.0:
        logits = options.logit_cap * torch.tanh(logits / options.logit_cap)
    return logits


def forward(
    tokens: Tensor,
    segment_ids: Optional[Tensor],
    parameters: Dict[str, Tensor],
    options: Options,
    training: bool,
    random: List[int],
) -> Tensor:
    """tokens int64 [B, S], segment_ids int32 [B, S] (0 = padding) or none -> logits float32 [B, S, V]."""
    h_BSD, _, _, _ = hidden_states(tokens, segment_ids, parameters, options, training, random)
    return output_logits(h_BSD, parameters, options)


def loss(
    tokens: Tensor,
    targets: Tensor,
    weights: Optional[Tensor],
    segment_ids: Optional[Tensor],
    parameters: Dict[str, Tensor],
    options: Options,
    training: bool,
    random: List[int],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss_sum [], aux [], router_z [], nll [B, S] and the router statistics int64 [MoE layers, E + 6].

    Sums over the tokens of this call; aux is reduced over the MoE layers as configured, router_z summed over them.
    random: [seed, step, index of the first token in the global batch], for the random routing policies.
    """
    assert targets.shape == tokens.shape, (
        "glam::GLaM.loss: expected targets to be [B, S] as tokens, "
        + str(list(tokens.shape))
        + ", got "
        + str(list(targets.shape))
    )
    if weights is not None:
        assert weights.shape == tokens.shape, (
            "glam::GLaM.loss: expected weights to be [B, S] as tokens, "
            + str(list(tokens.shape))
            + ", got "
            + str(list(weights.shape))
        )
    h_BSD, aux, router_z, statistics = hidden_states(tokens, segment_ids, parameters, options, training, random)
    loss_sum, nll, _ = torch.ops.glam.linear_cross_entropy(
        h_BSD.flatten(0, 1),
        output_table(parameters, options),
        targets.flatten(),
        None if weights is None else weights.flatten(),
        float(h_BSD.size(2)) ** -0.5,
        options.z_loss,
        options.label_smoothing,
        options.logit_cap,
    )
    aux_total = torch.zeros_like(loss_sum)
    router_z_total = torch.zeros_like(loss_sum)
    statistics_all = torch.zeros([0, options.num_experts + 6], dtype=torch.long, device=tokens.device)
    if len(aux) > 0:
        aux_total = torch.stack(aux).sum()
        if options.aux_loss_reduction == "mean":
            aux_total = aux_total / len(aux)
        router_z_total = torch.stack(router_z).sum()
        statistics_all = torch.stack(statistics)
    return loss_sum, aux_total, router_z_total, nll.view(targets.shape), statistics_all


def init_cache(batch: int, max_len: int, parameters: Dict[str, Tensor], options: Options) -> List[Tensor]:
    """Keys and values of each layer in turn, [batch, max_len, H, A] of the compute dtype, zero."""
    table = parameters["embedding.weight"]
    empty = torch.zeros([0], dtype=table.dtype, device=table.device)
    empty = torch.ops.glam.to_compute_dtype(empty, options.compute_dtype)
    cache: List[Tensor] = []
    for _ in range(2 * options.num_layers):
        cache.append(
            torch.zeros([batch, max_len, options.num_heads, options.head_dim], dtype=empty.dtype, device=table.device)
        )
    return cache


def step(
    tokens: Tensor,
    cache: List[Tensor],
    positions: Tensor,
    lengths: Tensor,
    parameters: Dict[str, Tensor],
    options: Options,
) -> Tuple[Tensor, List[Tensor]]:
    """Appends N tokens to every row and gives the logits after the last of them: float32 [B, V], and the cache.

    tokens int64 [B, N]; positions int32 [B]: index of the first new token, -1 for a finished row (its logits mean
    nothing, its cache stays); lengths int32 [B]: how many of the N tokens are real, the rest is padding on the right,
    whose cache entries later steps overwrite. A prefill is a step with many tokens.
    """
    assert tokens.dim() == 2, "glam::GLaM.step: expected tokens to be [B, N], got " + str(list(tokens.shape))
    x_BND = embed(tokens, parameters, options)
    new = torch.arange(tokens.size(1), device=tokens.device)
    mask_BN = (new < lengths.unsqueeze(1)) & (positions >= 0).unsqueeze(1)
    for layer in range(options.num_layers):
        prefix = "layers." + str(layer) + "."
        q, k, v = attention_inputs(x_BND, prefix, parameters, options)
        heads = torch.ops.glam.relative_attention_step(
            q,
            k,
            v,
            cache[2 * layer],
            cache[2 * layer + 1],
            positions,
            parameters[prefix + "attention.relative_bias"],
            options.attention_extra_logit,
            options.attention_logit_cap,
        )
        x_BND = x_BND + torch.ops.glam.linear(heads.flatten(2), parameters[prefix + "attention.o"])
        if is_moe_layer(layer, options):
            x_BND = moe_layer(x_BND, mask_BN.flatten(), layer, prefix, parameters, options, False, [0, 0, 0])[0]
        else:
            x_BND = dense_layer(x_BND, prefix, parameters, options)
    last = (lengths.to(torch.long) - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, x_BND.size(2))
    x_BD = x_BND.gather(1, last).squeeze(1)
    h_BD = torch.ops.glam.rms_norm(x_BD, parameters["final_norm.scale"], options.norm_eps)
    return output_logits(h_BD, parameters, options), cache


def generate(
    tokens: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stop_tokens: List[int],
    parameters: Dict[str, Tensor],
    options: Options,
) -> Tuple[Tensor, Tensor]:
    """Continues B prompts; the new tokens int64 [B, max_new_tokens] (0 after a stop) and how many each row has.

    tokens int64 [B, N], padded on the right; lengths int32 [B] >= 1. temperature 0 is greedy; top_k 0 and top_p 1 keep
    everything. A row ends with the first of stop_tokens, which is kept. Row b draws from counters (b, i) of the seed: a
    row gives the same tokens in any batch where it has the same index.
    """
    assert tokens.dim() == 2, "glam::generate: expected tokens to be [B, N], got " + str(list(tokens.shape))
    batch = tokens.size(0)
    if batch > 0:
        width, shortest, longest = tokens.size(1), int(lengths.min()), int(lengths.max())
        in_range = shortest >= 1 and longest <= width
        got = str(shortest) + " to " + str(longest)
        assert in_range, "glam::generate: expected lengths in [1, N] with N = " + str(width) + ", got " + got
    cache = init_cache(batch, tokens.size(1) + max_new_tokens, parameters, options)
    stop = torch.tensor(stop_tokens, dtype=torch.long, device=tokens.device)
    rows = torch.arange(batch, device=tokens.device) * 4294967296
    out = torch.zeros([batch, max_new_tokens], dtype=torch.long, device=tokens.device)
    finished = torch.zeros([batch], dtype=torch.bool, device=tokens.device)
    count = torch.zeros_like(lengths)
    positions = torch.zeros_like(lengths)
    new = lengths
    current = tokens
    for i in range(max_new_tokens):
        logits, cache = step(current, cache, positions, new, parameters, options)
        uniform = torch.ops.glam.counter_uniform(seed, 0, rows + i)
        chosen = torch.ops.glam.sample_logits(logits, uniform, temperature, top_k, top_p)
        chosen = torch.where(finished, torch.zeros_like(chosen), chosen)
        out[:, i] = chosen
        count = count + (~finished).to(count.dtype)
        finished = finished | torch.isin(chosen, stop)
        if bool(finished.all()):
            break
        positions = torch.where(finished, torch.full_like(lengths, -1), lengths + i)
        new = torch.ones_like(lengths)
        current = chosen.unsqueeze(1)
    return out, count


# --- end
