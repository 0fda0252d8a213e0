"""Bits that must not change: packed or alone, batched or single, cached or whole, any threads, several at once."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor

from glam_ext import _C, GLaM
from tests.ops.levels import busy_threads, same_bits, threads

from .helpers import COUNTERS, VARIANTS, assert_same_bits, batch_of, build, config_of, loss_and_gradients

PRECISIONS = pytest.mark.parametrize(
    ("compute_dtype", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.float32), ("bfloat16", torch.bfloat16), ("float32", torch.float64)],
    ids=["float32", "bfloat16", "bfloat16 parameters", "float64"],
)
ALL_VARIANTS = pytest.mark.parametrize("variant", VARIANTS)


def model_of(variant: str, compute_dtype: str, dtype: torch.dtype) -> GLaM:
    return build(config_of(variant, compute_dtype=compute_dtype), dtype).eval()


def tokens_of(model: GLaM, rows: int = 3, size: int = 40) -> Tensor:
    return batch_of(model.config, rows, size)["tokens"]


@PRECISIONS
@ALL_VARIANTS
def test_packed_segments_equal_the_segments_alone(variant: str, compute_dtype: str, dtype: torch.dtype) -> None:
    model = model_of(variant, compute_dtype, dtype)
    tokens = tokens_of(model)
    segment_ids = torch.zeros(3, 40, dtype=torch.int32)
    ends = [[0, 13, 14, 37], [0, 40], [0, 7, 20]]
    for row, bounds in enumerate(ends):
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            segment_ids[row, start:stop] = number + 1
    with torch.no_grad():
        packed = model(tokens, segment_ids)
        for row, bounds in enumerate(ends):
            for start, stop in itertools.pairwise(bounds):
                alone = model(tokens[row : row + 1, start:stop].contiguous())
                assert same_bits(packed[row : row + 1, start:stop], alone), (row, start)


@PRECISIONS
@ALL_VARIANTS
def test_a_row_of_a_batch_equals_the_row_alone(variant: str, compute_dtype: str, dtype: torch.dtype) -> None:
    model = model_of(variant, compute_dtype, dtype)
    tokens = tokens_of(model, rows=5)
    with torch.no_grad():
        whole = model(tokens)
        for row in range(5):
            assert same_bits(whole[row : row + 1], model(tokens[row : row + 1].contiguous())), row
        assert same_bits(model(tokens[:, :17].contiguous()), whole[:, :17].contiguous())  # causal


@PRECISIONS
@ALL_VARIANTS
def test_cached_steps_equal_the_whole(variant: str, compute_dtype: str, dtype: torch.dtype) -> None:
    """Prompts of different lengths, then steps of one and of three tokens, a row that ends, and a longer cache."""
    model = model_of(variant, compute_dtype, dtype)
    tokens = tokens_of(model)
    lengths = torch.tensor([5, 16, 9], dtype=torch.int32)
    with torch.no_grad():
        whole = model(tokens)
        for max_len in (40, 57):
            cache, positions = model.init_cache(3, max_len), torch.zeros(3, dtype=torch.int32)
            logits = model.step(tokens[:, :16].contiguous(), cache, positions, lengths)
            assert same_bits(logits, torch.stack([whole[row, n - 1] for row, n in enumerate(lengths)]))
            at = lengths
            for count in (1, 3, 1, 1):
                new = torch.stack([tokens[row, n : n + count] for row, n in enumerate(at)])
                logits = model.step(new, cache, at)
                at = at + count
                assert same_bits(logits, torch.stack([whole[row, n - 1] for row, n in enumerate(at)]))
            kept = [tensor.clone() for tensor in cache]
            finished = torch.where(torch.tensor([False, True, False]), -1, at)
            new = torch.stack([tokens[row, n : n + 1] for row, n in enumerate(at)])
            logits = model.step(new, cache, finished)
            for row in (0, 2):
                assert same_bits(logits[row], whole[row, at[row]])
            assert all(torch.equal(now[1], before[1]) for now, before in zip(cache, kept, strict=True))


def test_generation_of_a_row_does_not_depend_on_the_batch() -> None:
    model = model_of("default", "bfloat16", torch.float32)
    tokens, lengths = tokens_of(model), torch.tensor([5, 40, 9], dtype=torch.int32)
    sampling = (12, 0.9, 0, 0.95, 3, [1], None)
    together, _ = _C.generate(model._core, tokens, lengths, *sampling)
    first, _ = _C.generate(model._core, tokens[:1, :5].contiguous(), lengths[:1], *sampling)
    assert torch.equal(together[:1], first)
    for row in range(3):  # greedy draws nothing, so any row can be alone
        prompt = tokens[row : row + 1, : lengths[row]].contiguous()
        greedy = (12, 0.0, 0, 1.0, 0, [1], None)
        alone, _ = _C.generate(model._core, prompt, lengths[row : row + 1], *greedy)
        assert torch.equal(_C.generate(model._core, tokens, lengths, *greedy)[0][row], alone[0])


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@ALL_VARIANTS
def test_threads_do_not_change_a_gradient(variant: str, compute_dtype: str) -> None:
    config = config_of(variant, compute_dtype=compute_dtype)
    batch = batch_of(config, rows=4, size=48)
    with threads(1):
        expected = loss_and_gradients(build(config), batch, **COUNTERS)
    for count in (2, 3, 7):
        with threads(count):
            model = build(config)
            assert_same_bits(loss_and_gradients(model, batch, **COUNTERS), expected)
    with threads(2):
        assert busy_threads(lambda: model.loss(**batch)) > 1


def test_threads_do_not_change_the_sums_over_many_tokens() -> None:
    """More tokens than torch's own sum takes in one thread."""
    config = config_of(compute_dtype="float32")
    model, batch = build(config), batch_of(config, rows=1100, size=32)
    with threads(1), torch.no_grad():
        expected = model.loss(**batch)
    for count in (2, 3):
        with threads(count), torch.no_grad():
            loss = model.loss(**batch)
        for one, other in zip(loss, expected, strict=True):
            assert torch.equal(one, other)


def test_micro_batches_and_global_tokens_draw_the_same_numbers() -> None:
    """Routing noise and jitter belong to the global token: two halves with their offsets give the whole's numbers."""
    config = config_of(
        compute_dtype="float32", second_policy="random", second_threshold=0.9, router_jitter=0.2, capacity_factor=0.0
    )
    model, batch = build(config), batch_of(config, rows=4)
    whole = model.loss(**batch, seed=1, step=2)
    halves = [
        model.loss(**{name: value[part] for name, value in batch.items()}, seed=1, step=2, first_token=first)
        for part, first in ((slice(0, 2), 0), (slice(2, 4), 2 * 16))
    ]
    assert same_bits(torch.cat([half.nll for half in halves]), whole.nll)
    assert torch.equal(sum(half.router_statistics for half in halves), whole.router_statistics)
    assert int(sum(half.num_tokens for half in halves)) == int(whole.num_tokens)
    other = model.loss(**batch, seed=1, step=3)
    assert not torch.equal(other.nll, whole.nll)
    assert not torch.equal(model.loss(**batch, seed=2, step=2).nll, whole.nll)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_concurrent_inference_gives_the_same_bits(compute_dtype: str) -> None:
    """Forward, steps and generation from several threads on one model, while its mode is training."""
    model = build(config_of(compute_dtype=compute_dtype, capacity_factor=0.5))
    batches = [batch_of(model.config, seed=seed) for seed in range(6)]
    lengths = torch.tensor([5, 16, 9], dtype=torch.int32)

    def work(batch: dict[str, Tensor]) -> list[Tensor]:
        results = []
        with torch.no_grad():
            for _ in range(4):
                results.append(model(batch["tokens"], batch["segment_ids"]))
                results.append(model.loss(**batch).nll)
                results.append(model.step(batch["tokens"], model.init_cache(3, 16), torch.zeros_like(lengths), lengths))
                results.append(_C.generate(model._core, batch["tokens"], lengths, 4, 1.0, 0, 1.0, 0, [1], None)[0])
        return results

    expected = [work(batch) for batch in batches]
    found: dict[int, list[Tensor]] = {}
    workers = [
        threading.Thread(target=lambda index=index, batch=batch: found.update({index: work(batch)}))
        for index, batch in enumerate(batches)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, wanted in enumerate(expected):
        assert all(same_bits(a, b) for a, b in zip(found[index], wanted, strict=True)), index


def test_concurrent_training_of_two_models_gives_the_same_bits() -> None:
    configs = [config_of(recompute=recompute) for recompute in (False, True)]
    batch = batch_of(configs[0])
    expected = loss_and_gradients(build(configs[0]), batch)
    found: dict[int, dict[str, Tensor]] = {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = loss_and_gradients(build(configs[index]), batch)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index in range(2):
        assert_same_bits(found[index], expected)
