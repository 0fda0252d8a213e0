"""Continuing prompts with a GLaM: greedy or sampled, for token ids or text.

The loop is the C++ one that deployed programs run (glam/generate.h): a key-value cache, one step of all rows per
token. The logits equal those of an uncached forward bit for bit, and a row's tokens depend on its prompt, its index in
the batch and the seed alone, not on the other rows, the padding or the number of threads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast, overload

import torch

from glam_ext import _C
from glam_ext.model import GLaM

if TYPE_CHECKING:
    from glam_ext.data import Tokenizer

EOS, BOS = 1, 2
Stream = Callable[[list["int | None"]], "bool | None"]


@overload
def generate(
    model: GLaM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = ...,
    *,
    tokenizer: None = ...,
    temperature: float = ...,
    top_k: int = ...,
    top_p: float = ...,
    seed: int = ...,
    stop_tokens: Sequence[int] = ...,
    stream: Stream | None = ...,
) -> list[list[int]]: ...


@overload
def generate(
    model: GLaM,
    prompts: Sequence[str],
    max_new_tokens: int = ...,
    *,
    tokenizer: Tokenizer,
    temperature: float = ...,
    top_k: int = ...,
    top_p: float = ...,
    seed: int = ...,
    stop_tokens: Sequence[int] = ...,
    stream: Stream | None = ...,
) -> list[str]: ...


def generate(
    model: GLaM,
    prompts: Sequence[Sequence[int]] | Sequence[str],
    max_new_tokens: int = 64,
    *,
    tokenizer: Tokenizer | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_tokens: Sequence[int] = (EOS,),
    stream: Stream | None = None,
) -> list[list[int]] | list[str]:
    """What follows each prompt: lists of new token ids for lists of ids, texts for texts.

    Args:
        prompts: lists of ids, each with at least one, of any lengths; or, with `tokenizer`, texts, which get a BOS.
        max_new_tokens: a row ends after so many, or with the first of `stop_tokens`, which is its last one.
        temperature: 0 takes the likeliest token. top_k: keeps the k likeliest, 0 all. top_p: keeps the fewest likeliest
            that together have this probability.
        seed: the same arguments give the same tokens.
        stream: called after every step with each row's new token, None in rows that have ended; returning False ends
            the generation.

    Runs without gradients, as inference, whatever the mode of the model. Raises ``ValueError`` or ``TypeError`` that
    names the argument.
    """
    rows = _token_rows(prompts, tokenizer, model.config.vocab_size)
    _check(max_new_tokens, temperature, top_k, top_p, seed)
    stops = [operator.index(token) for token in stop_tokens]
    model._check_intact()
    if not rows:
        return []

    device = model.get_parameter("embedding.weight").device
    lengths = [len(row) for row in rows]
    padded = [[*row, *[0] * (max(lengths) - len(row))] for row in rows]
    tokens, counts = _C.generate(
        model._core,
        torch.tensor(padded, dtype=torch.int64, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        operator.index(max_new_tokens),
        float(temperature),
        operator.index(top_k),
        float(top_p),
        operator.index(seed),
        stops,
        None if stream is None else _on_step(stream, len(rows), set(stops)),
    )
    new = [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    if tokenizer is None:
        return new
    return [decode(tokenizer, row) for row in new]


def decode(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of generated ids. A model may know more ids than its tokenizer; these say nothing."""
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size])


def _token_rows(
    prompts: Sequence[Sequence[int]] | Sequence[str], tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    if isinstance(prompts, str):
        raise TypeError("glam_ext.generate: expected prompts to be a list, got one text; write [text]")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"glam_ext.generate: expected a tokenizer of at most the model's {vocab_size} tokens, got "
            f"{tokenizer.vocab_size}; use the one the model was trained with"
        )
    rows = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) != (tokenizer is not None):
            raise TypeError(
                "glam_ext.generate: expected texts together with a tokenizer or lists of ids without one, got "
                f"{'a text' if isinstance(prompt, str) else 'a list'} as prompt {index} "
                f"{'with' if tokenizer is not None else 'without'} a tokenizer"
            )
        if isinstance(prompt, str):
            assert tokenizer is not None
            rows.append([BOS, *tokenizer.encode(prompt)])
            continue
        row = [operator.index(token) for token in cast("Sequence[int]", prompt)]
        if not row:
            raise ValueError(f"glam_ext.generate: expected prompt {index} to have a token, got none; start it with BOS")
        for token in row:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"glam_ext.generate: expected the ids of prompt {index} to be in [0, {vocab_size}), got {token}"
                )
        rows.append(row)
    return rows


def _check(max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    def refuse(expected: str, got: object) -> ValueError:
        return ValueError(f"glam_ext.generate: expected {expected}, got {got}")

    if max_new_tokens < 0:
        raise refuse("max_new_tokens to be at least 0", max_new_tokens)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise refuse("temperature to be a number >= 0 (0: the likeliest token)", temperature)
    if top_k < 0:
        raise refuse("top_k to be at least 0 (0: all)", top_k)
    if not 0 < top_p <= 1:
        raise refuse("top_p to be in (0, 1] (1: all)", top_p)
    if not -(2**63) <= seed < 2**63:
        raise refuse("seed to fit 64 bits", seed)


def _on_step(stream: Stream, num_rows: int, stops: set[int]) -> Callable[[torch.Tensor], bool]:
    finished = [False] * num_rows

    def on_step(tokens: torch.Tensor) -> bool:
        new = [None if done else token for token, done in zip(tokens.tolist(), finished, strict=True)]
        for row, token in enumerate(new):
            finished[row] = finished[row] or token in stops
        return stream(new) is not False

    return on_step
