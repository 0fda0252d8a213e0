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
from collections.abc import Callable

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
STEPS = 8  # one after the other, as in decoding


READ_BYTES = 256 << 20


def reads() -> dict[str, Callable[[], object]]:
    small = torch.ones(READ_BYTES // 4)
    huge = torch.ops.glam.linear(torch.ones(READ_BYTES >> 12, 1), torch.ones(1, 1024))  # of the pool of large blocks
    return {"small pages": small.sum, "huge pages": huge.sum}


def cached_attention() -> tuple[Callable[[], object], int]:
    """A call, and the bytes that it reads."""
    shape = (1, 4096, CONFIG.num_heads, CONFIG.head_dim)
    keys, values = (torch.randn(shape).bfloat16() for _ in range(2))
    new = torch.randn(1, 1, *shape[2:]).bfloat16()
    positions, bias = torch.tensor([4095], dtype=torch.int32), torch.randn(CONFIG.num_heads, 32)
    step = torch.ops.glam.relative_attention_step
    return functools.partial(step, new, new, new, keys, values, positions, bias), 2 * keys.nbytes


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(STEPS):
            call()

    return calls


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
                attention, cache_bytes = cached_attention()
                step = functools.partial(run, model, token, cache, PROMPT)
                calls = {"step": repeated(step), "cache": repeated(attention), **reads()}
                seconds = medians(calls, 2 * chosen.repeats)
                read = READ_BYTES / min(seconds["small pages"], seconds["huge pages"])
                token_seconds = seconds["step"] / STEPS
                rate, cache_rate = active_bytes / token_seconds, STEPS * cache_bytes / seconds["cache"]
                print(
                    f"{name}, {threads} threads: {token_seconds * 1e3:.1f} ms a token, {rate / 1e9:.1f} GB/s, "
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
