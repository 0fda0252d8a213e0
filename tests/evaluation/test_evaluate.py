"""Held-out loss: every target once, whatever the batch; bits per byte of a model whose loss is known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from glam_ext import GLaMConfig
from glam_ext.checkpoint import save_checkpoint
from glam_ext.data import Corpus, TokenFolder, Tokenizer, write_corpus
from glam_ext.evaluation.heldout import HeldOutLoss, evaluate
from glam_ext.model import GLaM
from glam_ext.recipes import evaluate as recipe

CONFIG = GLaMConfig.preset("tiny", compute_dtype="float32")


@pytest.fixture(scope="module")
def text() -> str:
    return "".join(Corpus(["austen:heldout"]))[:3000] + "\n caf\u00e9 \u4e2d \n"


@pytest.fixture(scope="module")
def tokenizer(text: str) -> Tokenizer:
    return Tokenizer.train([text], 400)


@pytest.fixture(scope="module")
def folder(text: str, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenFolder:
    path = tmp_path_factory.mktemp("heldout")
    (path / "text.txt").write_text(text, encoding="utf-8")
    write_corpus(path / "tokens", Corpus([path / "text.txt"]), tokenizer, 16)
    return TokenFolder(path / "tokens")


def test_a_model_that_knows_nothing_pays_log_v_for_every_target(folder, text, tokenizer):
    model = GLaM(CONFIG)
    with torch.no_grad():
        model.get_parameter("embedding.weight").zero_()
    loss = evaluate(model, folder, 7)
    targets = len(tokenizer.encode(text)) + 1  # and the end of the text
    assert loss.num_tokens == targets
    assert loss.utf8_bytes == len(text.encode("utf-8"))
    assert loss.nats == pytest.approx(math.log(512), rel=1e-6)
    assert loss.perplexity == pytest.approx(512, rel=1e-5)
    assert loss.bits_per_byte == pytest.approx(targets * 9 / len(text.encode("utf-8")), rel=1e-6)


def test_the_loss_is_that_of_the_logits_and_does_not_depend_on_the_batch(folder):
    model = GLaM(CONFIG, seed=2).train()
    rows = folder.rows(range(len(folder)))
    tokens, targets, segments = (torch.from_numpy(array) for array in rows)
    model.eval()
    with torch.no_grad():
        logits = model(tokens, segments.int())
    log_p = torch.log_softmax(logits.double(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = -float(log_p[segments != 0].sum())
    model.train()
    found = [evaluate(model, folder, size) for size in (1, 5, len(folder) + 3)]
    assert model.training
    for loss in found:
        assert loss.total_nats == pytest.approx(expected, rel=1e-6)
        assert loss.capacity == "no capacity limit"
    assert found[0].total_nats == pytest.approx(found[1].total_nats, rel=1e-12)


def test_a_capped_evaluation_says_so_and_differs(folder):
    free, capped = GLaM(CONFIG, seed=2), GLaM(dataclasses.replace(CONFIG, eval_capacity_factor=0.5), seed=2)
    a, b = evaluate(free, folder, 4), evaluate(capped, folder, 4)
    assert b.capacity == "capacity factor 0.5"
    assert a.total_nats != b.total_nats


def test_it_stops_when_asked(folder):
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    model = GLaM(CONFIG).train()
    assert evaluate(model, folder, 4, stop) is None
    assert len(asked) == 2
    assert model.training


def test_a_model_with_fewer_ids_is_refused(folder):
    model = GLaM(dataclasses.replace(CONFIG, vocab_size=300))
    with pytest.raises(ValueError, match=r"tokens: has 400 token ids, the model knows 300; prepare the text with"):
        evaluate(model, folder, 4)


def test_perplexity_beyond_a_double_is_infinite():
    assert HeldOutLoss(1e6, 1, 1, "").perplexity == math.inf


def checkpoint(root: Path, tokenizer_hash: str) -> Path:
    model = GLaM(CONFIG, seed=2)
    return save_checkpoint(root, 3, CONFIG, model.state_dict(), {}, {"tokenizer_hash": tokenizer_hash}, keep=1)


def test_the_recipe_evaluates_a_checkpoint(folder, tokenizer, tmp_path, capsys):
    path = checkpoint(tmp_path, tokenizer.hash)
    expected = evaluate(GLaM(CONFIG, seed=2), folder, 16)
    assert recipe.main([str(path), "--data", str(folder.folder), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["step"] == 3
    assert record["nats"] == pytest.approx(expected.nats, rel=1e-12)
    assert record["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-12)
    assert recipe.main([str(tmp_path), "--data", str(folder.folder)]) == 0
    assert f"{expected.bits_per_byte:.4f} bits per byte" in capsys.readouterr().out


def test_the_recipe_names_what_is_wrong(folder, tmp_path, capsys):
    path = checkpoint(tmp_path, "0" * 64)
    assert recipe.main([str(path), "--data", str(folder.folder)]) == 1
    assert "was made with another tokenizer than the model's" in capsys.readouterr().err
    assert recipe.main([str(tmp_path / "none"), "--data", str(folder.folder)]) == 1
    assert "none: not a folder" in capsys.readouterr().err
