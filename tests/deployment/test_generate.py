"""Generation with the cache: its logits, its rows, and every choice of the sampler."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

from glam_ext.config import GLaMConfig
from glam_ext.data import DataError, Tokenizer
from glam_ext.generate import generate
from glam_ext.model import GLaM
from tests.deployment.conftest import CONFIG, sharp_model

PROMPTS = [[2, 5, 6, 7], [2], [2, 300, 41, 17, 9, 100, 3, 3, 8], [2, 511]]


@torch.no_grad()
def uncached(model: GLaM, prompt: list[int], new: list[int]) -> torch.Tensor:
    """The logits that each new token was chosen from, [len(new), V], from forwards of the whole text so far."""
    whole = torch.tensor([prompt + new])
    return torch.stack([model(whole[:, : len(prompt) + i])[0, -1] for i in range(len(new))])


@pytest.mark.parametrize(
    "changes", [{}, {"compute_dtype": "float32"}, {"num_experts": 0}, {"expert_activation": "geglu"}]
)
def test_cached_logits_are_the_uncached_ones(changes: dict[str, Any]) -> None:
    model = sharp_model(dataclasses.replace(CONFIG, **changes))
    tokens = torch.randint(4, CONFIG.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)
        cache = model.init_cache(3, 40)
        for begin, end in ((0, 7), (7, 8), (8, 9), (9, 39), (39, 40)):
            positions = torch.full((3,), begin, dtype=torch.int32)
            logits = model.step(tokens[:, begin:end].contiguous(), cache, positions)
            assert torch.equal(logits, expected[:, end - 1]), (begin, end)


def test_greedy_takes_the_largest_uncached_logit(model: GLaM) -> None:
    for prompt, new in zip(PROMPTS, generate(model, PROMPTS, 12, temperature=0.0, stop_tokens=()), strict=True):
        assert len(new) == 12
        assert new == uncached(model, prompt, new).argmax(1).tolist()
    assert len({tuple(new) for new in generate(model, PROMPTS, 12, temperature=0.0)}) > 1


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 50, "seed": 3}, {"seed": 4}])
def test_a_row_does_not_depend_on_the_others(model: GLaM, arguments: dict[str, Any]) -> None:
    together = generate(model, PROMPTS, 20, **arguments)
    for index in range(len(PROMPTS)):
        others = [PROMPTS[index] if row == index else [2] * (30 + row) for row in range(index + 1)]
        assert generate(model, others, 20, **arguments)[index] == together[index]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(model: GLaM, threads: int) -> None:
    expected = generate(model, PROMPTS, 10, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert generate(model, PROMPTS, 10, seed=1) == expected
    finally:
        torch.set_num_threads(before)


def test_seeds(model: GLaM) -> None:
    runs = [generate(model, PROMPTS, 16, seed=seed, stop_tokens=()) for seed in (0, 0, 1, -1, 2**62)]
    assert runs[0] == runs[1]
    assert len({str(run) for run in runs}) == 4
    # Equal prompts at different rows draw different numbers.
    first, second = generate(model, [PROMPTS[0]] * 2, 16, stop_tokens=())
    assert first != second


def test_sampled_tokens_stay_within_top_k(model: GLaM) -> None:
    seen = set()
    for seed in range(20):
        (new,) = generate(model, [PROMPTS[0]], 6, top_k=3, seed=seed, stop_tokens=())
        ranks = torch.argsort(uncached(model, PROMPTS[0], new), dim=1, descending=True, stable=True)[:, :3]
        chosen = [ranks[i].tolist().index(token) for i, token in enumerate(new)]  # raises if it is not among them
        seen.update(chosen)
    assert seen == {0, 1, 2}


def test_sampled_tokens_stay_within_top_p(model: GLaM) -> None:
    beyond_first = 0
    for seed in range(20):
        (new,) = generate(model, [PROMPTS[0]], 6, top_p=0.6, seed=seed, stop_tokens=())
        probabilities = uncached(model, PROMPTS[0], new).double().softmax(1)
        for token, p in zip(new, probabilities, strict=True):
            before = float(p[p > p[token]].sum())
            assert before < 0.6 + 1e-9
            beyond_first += before > 0
    assert beyond_first > 0


def test_temperature_flattens_and_sharpens(model: GLaM) -> None:
    def likelihood(temperature: float) -> float:
        total = 0.0
        for seed in range(8):
            (new,) = generate(model, [PROMPTS[0]], 8, temperature=temperature, seed=seed, stop_tokens=())
            log_p = uncached(model, PROMPTS[0], new).double().log_softmax(1)
            total += float(log_p.gather(1, torch.tensor(new).unsqueeze(1)).sum())
        return total

    assert likelihood(0.3) > likelihood(1.0) > likelihood(3.0)
    assert generate(model, PROMPTS, 8, temperature=1e-4) == generate(model, PROMPTS, 8, temperature=0.0)
    assert generate(model, PROMPTS, 8, top_k=1) == generate(model, PROMPTS, 8, temperature=0.0)


def test_a_row_ends_with_its_stop_token_and_the_others_go_on(model: GLaM) -> None:
    free = generate(model, PROMPTS, 12, seed=5, stop_tokens=())
    stop = free[0][4]
    stopped = generate(model, PROMPTS, 12, seed=5, stop_tokens=[stop, 519])
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    for row, new in zip(free, stopped, strict=True):
        ends = [i for i, token in enumerate(row) if token in (stop, 519)]
        assert new == (row[: ends[0] + 1] if ends else row)
    assert any(len(new) == 12 for new in stopped)


def test_stream_sees_every_token_and_can_end_it(model: GLaM) -> None:
    stop = generate(model, PROMPTS, 12, seed=5, stop_tokens=())[0][4]
    steps: list[list[int | None]] = []
    result = generate(model, PROMPTS, 12, seed=5, stop_tokens=[stop], stream=steps.append)  # type: ignore[func-returns-value]
    columns = [[token for token in column if token is not None] for column in zip(*steps, strict=True)]
    assert columns == result
    assert steps[-1][0] is None

    steps.clear()

    def three(new: list[int | None]) -> bool:
        steps.append(new)
        return len(steps) < 3

    result = generate(model, PROMPTS, 12, seed=5, stop_tokens=(), stream=three)
    assert [len(row) for row in result] == [3] * 4

    def broken(_: list[int | None]) -> None:
        raise KeyError("from the callback")

    with pytest.raises(KeyError, match="from the callback"):
        generate(model, PROMPTS, 12, stream=broken)


def test_a_training_model_infers_and_stays_in_training(model: GLaM) -> None:
    trained = GLaM(dataclasses.replace(CONFIG, second_policy="random", capacity_factor=0.5))
    trained.load_state_dict(model.state_dict())
    trained.train()
    assert generate(trained, PROMPTS, 8, seed=2) == generate(model, PROMPTS, 8, seed=2)
    assert trained.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.parameters())


def test_several_threads_at_once(model: GLaM) -> None:
    expected = [generate(model, PROMPTS, 12, seed=seed) for seed in range(4)]
    found: dict[int, list[list[int]]] = {}

    def work(seed: int) -> None:
        found[seed] = generate(model, PROMPTS, 12, seed=seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[seed] for seed in range(4)] == expected


def test_texts(model: GLaM, tokenizer: Tokenizer) -> None:
    texts = ["It is a truth", "", "caf\u00e9 \u2581"]
    prompts = [[2, *tokenizer.encode(text)] for text in texts]
    ids = generate(model, prompts, 20, seed=1)
    assert generate(model, texts, 20, seed=1, tokenizer=tokenizer) == [
        tokenizer.decode([token for token in row if token < 512]) for row in ids
    ]


def test_nothing_to_do(model: GLaM) -> None:
    assert generate(model, [], 5) == []
    assert generate(model, [[2], [3]], 0) == [[], []]


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([[2], []], {}, r"expected prompt 1 to have a token, got none; start it with BOS"),
        ([[2, 520]], {}, r"expected the ids of prompt 0 to be in \[0, 520\), got 520"),
        ([[2, -1]], {}, r"expected the ids of prompt 0 to be in \[0, 520\), got -1"),
        ([[2]], {"max_new_tokens": -1}, r"expected max_new_tokens to be at least 0, got -1"),
        ([[2]], {"temperature": -0.5}, r"expected temperature to be a number >= 0 .*, got -0.5"),
        ([[2]], {"temperature": float("nan")}, r"expected temperature to be a number >= 0 .*, got nan"),
        ([[2]], {"top_k": -1}, r"expected top_k to be at least 0 .*, got -1"),
        ([[2]], {"top_p": 0.0}, r"expected top_p to be in \(0, 1\] .*, got 0.0"),
        ([[2]], {"top_p": 1.5}, r"expected top_p to be in \(0, 1\] .*, got 1.5"),
        ([[2]], {"seed": 2**63}, r"expected seed to fit 64 bits, got 9223372036854775808"),
    ],
)
def test_impossible_values_are_named(model: GLaM, prompts: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"glam_ext.generate: {message}"):
        generate(model, prompts, **arguments)


def test_wrong_kinds_of_prompts(model: GLaM, tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match=r"expected prompts to be a list, got one text; write \[text\]"):
        generate(model, "text")
    with pytest.raises(TypeError, match=r"got a text as prompt 0 without a tokenizer"):
        generate(model, ["text"])
    with pytest.raises(TypeError, match=r"got a list as prompt 1 with a tokenizer"):
        generate(model, ["text", [2]], tokenizer=tokenizer)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        generate(model, [[2.5]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"expected a tokenizer of at most the model's 300 tokens, got 512"):
        generate(GLaM(GLaMConfig.preset("tiny", vocab_size=300)), ["text"], tokenizer=tokenizer)
    with pytest.raises(DataError, match="lone surrogate"):
        generate(model, ["\ud800"], tokenizer=tokenizer)
