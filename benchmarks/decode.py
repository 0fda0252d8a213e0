"""Decoding one token after the other, and prefill, with weights far larger than the caches.

    python benchmarks/decode.py [--weights bfloat16 int8 plain]

A GLaM of 4 layers, D = 2048, F = 5632, E = 8, 16 heads of 128, V = 32,000, random weights, batch 1, bfloat16 compute.
Weights as `prepare_for_inference` packs them, or (plain) unpacked in bfloat16.

decode   bytes of the parameters that a token uses (glam_ext.count_parameters) per second of a step, over the rate at
         which this machine reads: the best of a threaded sum over 256 MB that are in no cache, in 4 KiB and 2 MiB pages
cache    bytes of keys and values per second of relative_attention_step, one new token after 4095, over the same rate
prefill  2 FLOPs for each parameter that a token uses and each token of the prompt, logits of the last one only, over
         the dense rate (benchmarks/reference_rates.py)
"""

from __future__ import annotations

import functools

import torch
from common import medians, parser, print_header
from reference_rates import dense_rate

import glam_ext

CONFIG = glam_ext.GLaMConfig(
    vocab_size=32000,
    model_dim=2048,
    hidden_dim=5632,
    num_layers=4,
    num_heads=16,
    head_dim=128,
    num_experts=8,
    compute_dtype="bfloat16",
)
PROMPT = 16


def read_rate(repeats: int) -> float:
    """Bytes per second."""
    source = torch.ones(64 << 20)
    huge = torch.ops.glam.linear(torch.ones(64 << 10, 1), torch.ones(1, 1024))  # from the pool of large blocks
    seconds = medians({"small pages": source.sum, "huge pages": huge.sum}, repeats)
    return source.nbytes / min(seconds.values())


def cached_attention(repeats: int) -> float:
    """Bytes per second."""
    shape = (1, 4096, CONFIG.num_heads, CONFIG.head_dim)
    keys, values = (torch.randn(shape).bfloat16() for _ in range(2))
    new = torch.randn(1, 1, *shape[2:]).bfloat16()
    positions, bias = torch.tensor([4095], dtype=torch.int32), torch.randn(CONFIG.num_heads, 32)
    step = torch.ops.glam.relative_attention_step
    call = functools.partial(step, new, new, new, keys, values, positions, bias)
    return 2 * keys.nbytes / medians({"step": call}, 3 * repeats)["step"]


def run(model: glam_ext.GLaM, tokens: torch.Tensor, cache: object, position: int) -> None:
    lengths = torch.tensor([tokens.shape[1]], dtype=torch.int32)
    model.step(tokens, cache, torch.tensor([position], dtype=torch.int32), lengths)


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--weights", nargs="+", default=["bfloat16", "int8", "plain"])
    chosen = arguments.parse_args()
    print_header()
    count = glam_ext.count_parameters(CONFIG)
    print(f"{count.total / 1e6:.0f} M parameters, {count.active / 1e6:.0f} M of them for each token")
    for name in chosen.weights:
        model = glam_ext.GLaM(CONFIG).eval()
        model = model.to(torch.bfloat16) if name == "plain" else model.prepare_for_inference(name)
        active_bytes = count.active * (1 if name == "int8" else 2)
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            with torch.no_grad():
                cache = model.init_cache(1, PROMPT + 1)
                run(model, torch.ones(1, PROMPT, dtype=torch.long), cache, 0)
                token = torch.ones(1, 1, dtype=torch.long)
                seconds = medians({"step": functools.partial(run, model, token, cache, PROMPT)}, 3 * chosen.repeats)
                rate, read = active_bytes / seconds["step"], read_rate(chosen.repeats)
                cache_rate = cached_attention(chosen.repeats)
                print(
                    f"{name}, {threads} threads: {seconds['step'] * 1e3:.1f} ms a token, {rate / 1e9:.1f} GB/s, "
                    f"{rate / read:.2f} of the {read / 1e9:.1f} GB/s that are read; cache {cache_rate / read:.2f}"
                )
                dense, whose = dense_rate(torch.bfloat16, 1024, CONFIG.model_dim, CONFIG.hidden_dim, chosen.repeats)
                for length in (256, 1024):
                    prompt = torch.ones(1, length, dtype=torch.long).cumsum(1)
                    cache = model.init_cache(1, length)
                    time = medians({"prefill": functools.partial(run, model, prompt, cache, 0)}, 3)["prefill"]
                    embedding = CONFIG.vocab_size * CONFIG.model_dim
                    flops = 2.0 * ((count.active - embedding) * length + embedding)
                    print(
                        f"  prefill of {length}: {length / time:.0f} tokens/s, {flops / time / 1e9:.0f} GFLOP/s, "
                        f"{flops / time / dense:.2f} of the dense {dense / 1e9:.0f} ({whose})"
                    )
        del model


if __name__ == "__main__":
    main()
