"""Every CUDA kernel against the bytes it must move, and the experts' products against the library's.

    python benchmarks/gpu.py [--tokens 16384] [--dim 2048] [--hidden 8192] [--experts 64]

Each line: median time of a call (CUDA events around graph replays, so that launches cost what they cost in a graph),
the bytes it must move (each input read once, each output written once), the rate that follows, and that rate as a
share of a device-to-device copy's, measured in the same run. Products show FLOP/s beside those of a square product by
torch: bfloat16 for the loss and attention, float32 for the experts, whose kernels do not use tensor cores. Small inputs
stay in the second-level cache between the replays.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

import glam_ext

GLAM = torch.ops.glam
REPEATS = 20


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


class Report:
    def __init__(self) -> None:
        source = torch.randn(256 << 20, device="cuda")
        target = torch.empty_like(source)
        self.copy_rate = nbytes(source, target) / median_seconds(lambda: target.copy_(source))
        print(f"copy: {self.copy_rate / 1e9:.0f} GB/s, read and written")

    def memory(self, name: str, call: Callable[[], object], moved: int) -> None:
        seconds = median_seconds(call)
        rate = moved / seconds
        share = rate / self.copy_rate
        print(f"{name:32} {seconds * 1e6:9.1f} us {moved / 1e6:9.1f} MB {rate / 1e9:7.0f} GB/s {share:5.2f}")

    def product(self, name: str, call: Callable[[], object], flops: float, library: float) -> None:
        seconds = median_seconds(call)
        print(f"{name:32} {seconds * 1e6:9.1f} us {flops / seconds / 1e12:9.2f} TFLOP/s, library {library / 1e12:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}; {glam_ext.build_info()['backends']['cuda']}")
    T, D, F, E = options.tokens, options.dim, options.hidden, options.experts
    print(f"T={T} D={D} F={F} E={E} V={options.vocabulary}, bfloat16 activations, float32 weights")
    report = Report()

    logits = torch.randn(T, E)
    for group, capacity in ((1024, -1), (1024, 2 * 1024 // E), (-1, -1)):
        call = lambda g=group, c=capacity: GLAM.top2_gating(logits, None, None, g, c)  # noqa: E731
        report.memory(f"top2_gating group={group} C={capacity}", call, nbytes(logits, *call()))
    gates, ids, positions, aux = GLAM.top2_gating(logits, None, None, 1024)
    grads = torch.randn_like(gates), torch.randn_like(aux)
    report.memory(
        "top2_gating backward",
        lambda: GLAM._top2_gating_backward(*grads, logits, ids, positions, 1024, True),
        2 * nbytes(logits) + nbytes(grads[0], ids, positions),
    )
    plan = GLAM.routing_plan(ids, positions, E)
    report.memory("routing_plan", lambda: GLAM.routing_plan(ids, positions, E), nbytes(ids, positions, *plan))

    x = torch.randn(T, D, dtype=torch.bfloat16)
    rows = GLAM.dispatch(x, *plan)
    report.memory("dispatch", lambda: GLAM.dispatch(x, *plan), nbytes(x, rows))
    report.memory("dispatch backward", lambda: GLAM._dispatch_backward(rows, *plan), nbytes(x, rows))
    report.memory("combine", lambda: GLAM.combine(rows, gates, *plan), nbytes(x, rows))
    report.memory("combine backward", lambda: GLAM._combine_backward(x, rows, gates, *plan), nbytes(x, rows, rows))

    scale = torch.randn(D)
    report.memory("rms_norm", lambda: GLAM.rms_norm(x, scale), 2 * nbytes(x))
    report.memory("rms_norm backward", lambda: GLAM._rms_norm_backward(x, x, scale, 1e-6), 3 * nbytes(x))
    table, tokens = torch.randn(options.vocabulary, D, dtype=torch.bfloat16), torch.randint(options.vocabulary, (T,))
    report.memory("embedding", lambda: GLAM.embedding(tokens, table), 2 * nbytes(x))
    report.memory(
        "embedding backward", lambda: GLAM._embedding_backward(x, tokens, options.vocabulary), nbytes(x, table)
    )

    weight, grad = torch.randn(8, D, F), torch.randn(8, D, F)
    row_var, col_var = torch.rand(8, D), torch.rand(8, F)
    step, rate, skip = torch.tensor(3), torch.tensor(1e-2), torch.tensor(False)
    sums = GLAM.adafactor_sums(grad, weight, True)
    report.memory("adafactor_sums", lambda: GLAM.adafactor_sums(grad, weight, True), nbytes(grad, weight))
    totals = GLAM.adafactor_stats_(row_var, col_var, grad, *sums[:2], step, skip, D, F)
    report.memory(
        "adafactor_stats_",
        lambda: GLAM.adafactor_stats_(row_var, col_var, grad, *sums[:2], step, skip, D, F),
        nbytes(grad),
    )
    means, squares = totals[0] / D, (totals[0] / D * totals[1]).sum()
    report.memory(
        "adafactor_apply_",
        lambda: GLAM.adafactor_apply_(
            weight, grad, row_var, col_var, means, sums[2], squares, rate, skip, weight.numel()
        ),
        3 * nbytes(grad),
    )
    report.memory("squared_norm", lambda: GLAM.squared_norm(grad), nbytes(grad))

    hidden, targets = x[:4096], tokens[:4096]
    flops = 2.0 * 4096 * D * options.vocabulary
    product = (
        2.0
        * 8192**3
        / median_seconds(
            lambda a=torch.randn(8192, 8192, dtype=torch.bfloat16): a @ a  # noqa: B008
        )
    )
    report.product(
        "linear_cross_entropy fwd + grads",
        lambda: GLAM._linear_cross_entropy_with_gradients(
            hidden, table, targets, None, 1.0, 1e-4, 0.0, 0.0, True, True
        ),
        3 * flops,
        product,
    )

    single = 2.0 * 4096**3 / median_seconds(lambda a=torch.randn(4096, 4096): a @ a)  # noqa: B008
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

    B, S, H, A = 4, 1024, 16, 128
    q, k, v = (torch.randn(B, S, H, A, dtype=torch.bfloat16) * A**-0.25 for _ in range(3))
    bias = torch.randn(H, 32)
    flops = 2.0 * 2 * B * H * S * S * A / 2
    report.product("relative_attention forward", lambda: GLAM.relative_attention(q, k, v, bias, None), flops, product)
    out, lse = GLAM._relative_attention_forward(q, k, v, bias, None, True, 0.0)
    report.product(
        "relative_attention backward",
        lambda: GLAM._relative_attention_backward(out, q, k, v, bias, None, lse, True, 0.0),
        2.5 * flops,
        product,
    )


if __name__ == "__main__":
    main()
