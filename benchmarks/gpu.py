"""The CUDA ops against the bytes they must move and against what torch has for the same, and products against torch's.

    python benchmarks/gpu.py [--tokens 16384] [--dim 2048] [--hidden 8192] [--experts 64]

Each line: median time of a call (CUDA events around graph replays, so that launches cost what they cost in a graph),
the bytes it must move (each input read once, each output written once), the rate that follows, that rate as a share of
a device-to-device copy's, measured in the same run, and, where torch has ops for the same or nearly so, their time in
units of ours, ten calls in a row: softmax and topk, indexing, rms_norm, embedding, vector_norm, multinomial, linear,
cross_entropy of linear, scaled_dot_product_attention without a bias. Products show FLOP/s beside those of a square
product by torch: bfloat16 for the loss and attention, float32 for the experts, whose kernels do not use tensor cores.
Small inputs stay in the second-level cache between the replays.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import glam_ext
from glam_ext.optim import Adafactor

GLAM = torch.ops.glam
REPEATS = 20
COPIED = 256 << 20  # float32 numbers


def median_seconds(call: Callable[[], object]) -> float:
    """Of replays of a graph of the call; capturing it also proves that it never waits for the device."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def eager_seconds(call: Callable[[], object], calls: int = 10) -> float:
    """Of calls that follow each other without a graph, in which not all of torch's ops can be captured."""
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times[REPEATS // 4 :])


def in_units(library: Callable[[], object] | None, seconds: float) -> str:
    return "" if library is None else f"  torch {eager_seconds(library) / seconds:.2f}"


class Report:
    def __init__(self) -> None:
        source = torch.randn(COPIED)
        target = torch.empty_like(source)
        self.copy_rate = nbytes(source, target) / median_seconds(lambda: target.copy_(source))
        print(f"copy: {self.copy_rate / 1e9:.0f} GB/s, read and written")

    def memory(
        self, name: str, call: Callable[[], object], moved: int, library: Callable[[], object] | None = None
    ) -> None:
        seconds = median_seconds(call)
        rate = moved / seconds
        share = rate / self.copy_rate
        print(
            f"{name:32} {seconds * 1e6:9.1f} us {moved / 1e6:9.1f} MB {rate / 1e9:7.0f} GB/s {share:5.2f}"
            + in_units(library, seconds)
        )

    def product(
        self,
        name: str,
        call: Callable[[], object],
        flops: float,
        square: float,
        library: Callable[[], object] | None = None,
    ) -> None:
        seconds = median_seconds(call)
        print(
            f"{name:32} {seconds * 1e6:9.1f} us {flops / seconds / 1e12:9.2f} TFLOP/s, a square product "
            f"{square / 1e12:.1f}" + in_units(library, seconds)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--square", type=int, default=8192, help="size of torch's product of bfloat16 matrices")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; {glam_ext.build_info()['backends']['cuda']}")
    T, D, F, E = options.tokens, options.dim, options.hidden, options.experts
    print(f"T={T} D={D} F={F} E={E} V={options.vocabulary}, bfloat16 activations, float32 weights")
    report = Report()
    square = square_rate(options.square, torch.bfloat16)
    routing_and_experts(report, T, D, F, E, square)
    rows(report, T, D, options.vocabulary)
    optimiser(report, D, F)
    loss(report, D, options.vocabulary, square)
    attention(report, square)
    generation(report, options.vocabulary)


def square_rate(size: int, dtype: torch.dtype) -> float:
    a = torch.randn(size, size, dtype=dtype)
    return 2.0 * size**3 / median_seconds(lambda: a @ a)


def routing_and_experts(report: Report, T: int, D: int, F: int, E: int, square: float) -> None:
    logits = torch.randn(T, E)
    for group, capacity in ((1024, -1), (1024, 2 * 1024 // E), (-1, -1)):
        call = lambda g=group, c=capacity: GLAM.top2_gating(logits, None, None, g, c)  # noqa: E731
        report.memory(
            f"top2_gating group={group} C={capacity}",
            call,
            nbytes(logits, *call()),
            lambda: logits.softmax(-1).topk(2),
        )
    gates, ids, positions, aux = GLAM.top2_gating(logits, None, None, 1024)
    grads = torch.randn_like(gates), torch.randn_like(aux)
    report.memory(
        "top2_gating backward",
        lambda: GLAM._top2_gating_backward(*grads, logits, ids, positions, 1024, True),
        2 * nbytes(logits) + nbytes(grads[0], ids, positions),
    )
    plan = GLAM.routing_plan(ids, positions, E)
    report.memory("routing_plan", lambda: GLAM.routing_plan(ids, positions, E), nbytes(ids, positions, *plan))
    slotted = GLAM.routing_plan(ids, positions, E, 1024, 4 * 1024 // E)
    report.memory(
        "routing_plan, slotted",
        lambda: GLAM.routing_plan(ids, positions, E, 1024, 4 * 1024 // E),
        nbytes(ids, positions, *slotted),
    )
    report.memory("router_statistics", lambda: GLAM.router_statistics(ids, positions, E), nbytes(ids, positions))

    x = torch.randn(T, D, dtype=torch.bfloat16)
    rows = GLAM.dispatch(x, *plan)
    token_of_row = plan[1].long().clamp(min=0) // 2
    report.memory("dispatch", lambda: GLAM.dispatch(x, *plan), nbytes(x, rows), lambda: x[token_of_row])
    report.memory("dispatch backward", lambda: GLAM._dispatch_backward(rows, *plan), nbytes(x, rows))
    report.memory("combine", lambda: GLAM.combine(rows, gates, *plan), nbytes(x, rows))
    report.memory("combine backward", lambda: GLAM._combine_backward(x, rows, gates, *plan), nbytes(x, rows, rows))

    single = square_rate(4096, torch.float32)
    experts = min(E, 8)
    few_ids = ids % experts
    few = GLAM.routing_plan(few_ids, positions, experts)
    wi, wo = torch.randn(experts, D, F) * D**-0.5, torch.randn(experts, F, D) * F**-0.5
    flops = 2 * 2.0 * 2 * T * D * F
    report.product(
        "moe_mlp forward (plain tiles)", lambda: GLAM.moe_mlp(x, gates, *few, wi, wo, None, "gelu"), flops, single
    )
    y, pre, pre_gate = GLAM._moe_mlp_forward(x, gates, *few, wi, wo, None, "gelu")
    report.product(
        "moe_mlp backward (plain tiles)",
        lambda: GLAM._moe_mlp_backward(y, x, gates, *few, pre, pre_gate, wi, wo, None, "gelu"),
        2 * flops,
        single,
    )
    offsets = few[2]
    few_rows = GLAM.dispatch(x, *few)
    report.product(
        "expert_mlp forward (plain tiles)",
        lambda: GLAM.expert_mlp(few_rows, offsets, wi, wo, None, "gelu"),
        flops,
        single,
    )
    narrow = wi[0].bfloat16()
    w0, w1, w2 = wi[0].contiguous(), wi[1 % experts].contiguous(), wo[0].contiguous()
    report.product(
        "geglu_mlp forward (plain tiles)", lambda: GLAM.geglu_mlp(x, w0, w1, w2), 3 * 2.0 * T * D * F, single
    )
    report.product("linear", lambda: GLAM.linear(x, w0), 2.0 * T * D * F, square, lambda: x @ narrow)


def rows(report: Report, T: int, D: int, V: int) -> None:
    x = torch.randn(T, D, dtype=torch.bfloat16)
    scale = torch.randn(D)
    narrow = scale.bfloat16()  # torch's kernel takes it in the dtype of x
    report.memory("rms_norm", lambda: GLAM.rms_norm(x, scale), 2 * nbytes(x), lambda: torch.rms_norm(x, (D,), narrow))
    report.memory("rms_norm backward", lambda: GLAM._rms_norm_backward(x, x, scale, 1e-6), 3 * nbytes(x))
    table, tokens = torch.randn(V, D, dtype=torch.bfloat16), torch.randint(V, (T,))
    report.memory("embedding", lambda: GLAM.embedding(tokens, table), 2 * nbytes(x), lambda: table[tokens])
    report.memory(
        "embedding backward",
        lambda: GLAM._embedding_backward(x, tokens, V),
        nbytes(x, table),
        lambda: torch.ops.aten.embedding_dense_backward(x, tokens, V, -1, False),
    )
    wide = x.float()
    report.memory("ordered_sum", lambda: GLAM.ordered_sum(wide), nbytes(wide), lambda: wide.sum())


def optimiser(report: Report, D: int, F: int) -> None:
    weight, grad = torch.randn(8, D, F), torch.randn(8, D, F)
    row_var, col_var = torch.rand(8, D), torch.rand(8, F)
    step, rate, skip = torch.tensor(3), torch.tensor(1e-2), torch.tensor(False)
    sums = GLAM.adafactor_sums([grad], [weight], [True])
    report.memory("adafactor_sums", lambda: GLAM.adafactor_sums([grad], [weight], [True]), nbytes(grad, weight))
    state = [row_var], [col_var], [grad]
    means, scaled = GLAM.adafactor_stats_(*state, *sums[:2], step, skip, [D], [F])
    report.memory(
        "adafactor_stats_", lambda: GLAM.adafactor_stats_(*state, *sums[:2], step, skip, [D], [F]), nbytes(grad)
    )
    squares = GLAM.adafactor_update_squares(means, scaled, [8])
    sizes = [weight.numel()]
    report.memory(
        "adafactor_apply_",
        lambda: GLAM.adafactor_apply_(
            [weight], [grad], [row_var], [col_var], means, sums[2], squares, rate, skip, sizes
        ),
        3 * nbytes(grad),
    )
    report.memory(
        "squared_norm", lambda: GLAM.squared_norm([grad]), nbytes(grad), lambda: torch.linalg.vector_norm(grad)
    )
    variance, none = torch.rand(8, D, F), torch.empty(0)
    whole = GLAM.adafactor_sums([grad], [weight], [False])
    one = torch.ones(1, dtype=torch.float64)
    report.memory(
        "adafactor_stats_, unfactored",
        lambda: GLAM.adafactor_stats_([variance], [none], [grad], *whole[:2], step, skip, [1], [1]),
        3 * nbytes(grad),
    )
    report.memory(
        "adafactor_apply_, unfactored",
        lambda: GLAM.adafactor_apply_([weight], [grad], [variance], [none], one, whole[2], squares, rate, skip, sizes),
        4 * nbytes(grad),
    )
    # A model's worth of small parameters: what many launches would cost.
    weights = [torch.randn(256, 256).requires_grad_() for _ in range(100)]
    for small in weights:
        small.grad = torch.randn_like(small)
    update = Adafactor(weights, rate).step
    report.memory("Adafactor, 100 of 256 x 256", update, 6 * nbytes(*weights))


def loss(report: Report, D: int, V: int, square: float) -> None:
    hidden, table = torch.randn(4096, D, dtype=torch.bfloat16), torch.randn(V, D, dtype=torch.bfloat16)
    targets = torch.randint(V, (4096,))
    flops = 2.0 * 4096 * D * V
    leaves = [hidden.clone().requires_grad_(), table.clone().requires_grad_()]

    def composition() -> object:
        logits = torch.nn.functional.linear(*leaves).float()
        return torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), leaves)

    report.product(
        "linear_cross_entropy fwd + grads",
        lambda: GLAM._linear_cross_entropy_with_gradients(
            hidden, table, targets, None, 1.0, 1e-4, 0.0, 0.0, True, True
        ),
        3 * flops,
        square,
        composition,
    )


def attention(report: Report, square: float) -> None:
    B, S, H, A = 4, 1024, 16, 128
    q, k, v = (torch.randn(B, S, H, A, dtype=torch.bfloat16) * A**-0.25 for _ in range(3))
    bias = torch.randn(H, 32)
    flops = 2.0 * 2 * B * H * S * S * A / 2
    q_heads, k_heads, v_heads = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    report.product(
        "relative_attention forward",
        lambda: GLAM.relative_attention(q, k, v, bias, None),
        flops,
        square,
        lambda: torch.nn.functional.scaled_dot_product_attention(q_heads, k_heads, v_heads, is_causal=True, scale=1.0),
    )
    out, lse = GLAM._relative_attention_forward(q, k, v, bias, None, True, 0.0)
    report.product(
        "relative_attention backward",
        lambda: GLAM._relative_attention_backward(out, q, k, v, bias, None, lse, True, 0.0),
        2.5 * flops,
        square,
    )
    caches = [torch.randn(B, S, H, A, dtype=torch.bfloat16) for _ in range(2)]
    one, at = (x[:, :1].contiguous() for x in (q, k, v)), torch.full((B,), S - 1, dtype=torch.int32)
    new = list(one)
    report.memory(
        "relative_attention_step",
        lambda: GLAM.relative_attention_step(*new, *caches, at, bias),
        nbytes(*caches),
    )
    beams = torch.arange(B).flip(0)
    report.memory(
        "reorder_cache_",
        lambda: GLAM.reorder_cache_(caches[0], beams),
        2 * nbytes(caches[0]),
        lambda: caches[0][beams],
    )


def generation(report: Report, V: int) -> None:
    logits, numbers = torch.randn(64, V), torch.rand(64)
    report.memory(
        "sample_logits",
        lambda: GLAM.sample_logits(logits, numbers, 1.0),
        nbytes(logits),
        lambda: torch.multinomial(logits.softmax(-1), 1),
    )
    report.memory(
        "sample_logits top_k top_p", lambda: GLAM.sample_logits(logits, numbers, 0.8, 50, 0.9), nbytes(logits)
    )
    index = torch.arange(1 << 20)
    uniform = GLAM.counter_uniform(7, 3, index)
    report.memory("counter_uniform", lambda: GLAM.counter_uniform(7, 3, index), nbytes(index, uniform))


if __name__ == "__main__":
    main()
