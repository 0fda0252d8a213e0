"""examples/deploy_cpp, built outside the tree with the installed package alone, and run without Python."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from glam_ext.generate import generate
from glam_ext.model import GLaM
from tests.deployment.conftest import Deployed
from tests.examples import Program

PROMPTS = [[2, 5, 6, 7], [2], [2, 300, 41, 17, 9, 100, 3, 3, 8], [2, 511]]
ROWS = [argument for prompt in PROMPTS for argument in ("--tokens", ",".join(map(str, prompt)))]
TEXT = "It is a truth \u2581caf\u00e9"
SAMPLING = ["--temperature", "0.8", "--top-k", "60", "--top-p", "0.9", "--seed", "11"]


@pytest.mark.parametrize(("source", "threads"), [("archive", "1"), ("archive", "3"), ("checkpoint", "3"), ("run", "1")])
def test_tokens_and_logits_are_those_of_python(
    deployed: Deployed, deploy: Program, source: str, threads: str, tmp_path: Path
) -> None:
    logits = tmp_path / "logits"
    options = ["--max-new-tokens", "24", *SAMPLING, "--threads", threads, "--logits", logits]
    result = deploy(getattr(deployed, source), *ROWS, *options)
    assert result.returncode == 0, result.stderr
    new = generate(deployed.model, PROMPTS, 24, temperature=0.8, top_k=60, top_p=0.9, seed=11)
    assert result.stdout.splitlines() == [",".join(map(str, row)) for row in new]
    assert re.search(rf"^{sum(map(len, new))} tokens in [0-9.]+ s, [0-9.]+ tokens per second$", result.stderr, re.M)
    with torch.no_grad():
        expected = torch.stack(
            [deployed.model(torch.tensor([p + row]))[0, -1] for p, row in zip(PROMPTS, new, strict=True)]
        )
    assert logits.read_bytes() == expected.numpy().tobytes()


def test_greedy(deployed: Deployed, deploy: Program) -> None:
    new = generate(deployed.model, PROMPTS, 10, temperature=0.0)
    for source in (deployed.archive, deployed.checkpoint):
        result = deploy(source, *ROWS, "--max-new-tokens", "10", "--temperature", "0")
        assert result.stdout.splitlines() == [",".join(map(str, row)) for row in new]


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_packed_weights(deployed: Deployed, deploy: Program, weights: str) -> None:
    model = GLaM.from_checkpoint(deployed.checkpoint, inference=weights)
    new = generate(model, PROMPTS, 10, temperature=0.0)
    result = deploy(deployed.checkpoint, *ROWS, "--max-new-tokens", "10", "--temperature", "0", "--weights", weights)
    assert result.stdout.splitlines() == [",".join(map(str, row)) for row in new], result.stderr


def test_no_python_is_loaded(deployed: Deployed, deploy: Program, tmp_path: Path) -> None:
    for source in (deployed.archive, deployed.checkpoint):
        deploy.assert_no_python(tmp_path / f"{source.name}.log", source, "--tokens", "2,5", "--max-new-tokens", "3")


def test_the_program_says_what_it_has(deploy: Program, has_sentencepiece: bool) -> None:
    result = deploy("--help")
    assert result.returncode == 0
    assert f"torch {torch.__version__.split('+')[0]}" in result.stdout
    expected = "text by SentencePiece" if has_sentencepiece else "token ids only: SentencePiece was not found"
    assert expected in result.stdout


@pytest.fixture
def text_program(deploy: Program, has_sentencepiece: bool) -> Program:
    if not has_sentencepiece:
        pytest.skip("SentencePiece's C++ library is not installed (Debian: libsentencepiece-dev)")
    return deploy


@pytest.mark.parametrize("text", [TEXT, "", "a", " leading and  double\nlines", "\u2581\u2581"])
def test_text_is_that_of_python(deployed: Deployed, text_program: Program, text: str) -> None:
    tokenizer = deployed.tokenizer
    prompt = [2, *tokenizer.encode(text)]
    (new,) = generate(deployed.model, [prompt], 32, temperature=0.8, top_k=60, top_p=0.9, seed=11)
    expected = tokenizer.decode([token for token in prompt + new if token < tokenizer.vocab_size])
    for source, flags in (
        (deployed.archive, []),
        (deployed.archive, ["--tokenizer", deployed.tokenizer_file]),
        (deployed.run, ["--tokenizer", deployed.tokenizer_file]),
    ):
        result = text_program(source, *flags, "--prompt", text, "--max-new-tokens", "32", "--threads", "1", *SAMPLING)
        assert result.returncode == 0, result.stderr
        assert result.stdout == expected + "\n"


def test_another_tokenizer_is_refused(deployed: Deployed, text_program: Program, tmp_path: Path) -> None:
    from glam_ext.data import Tokenizer

    other = tmp_path / "other.model"
    Tokenizer.train(["some other text of other words, again and again " * 50], 300).save(other)
    for source in (deployed.archive, deployed.run):
        result = text_program(source, "--tokenizer", other, "--prompt", "x")
        assert result.returncode == 1
        assert result.stderr.startswith("deploy: this is not the tokenizer that the model was trained with")
    result = text_program(deployed.run, "--prompt", "x")
    assert "expected --tokenizer FILE with --prompt: the model does not carry its tokenizer" in result.stderr
    other.write_bytes(b"no model")
    assert "damaged tokenizer model" in text_program(deployed.run, "--tokenizer", other, "--prompt", "x").stderr


def test_bad_input_ends_in_one_line(deployed: Deployed, deploy: Program, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(deployed.archive.read_bytes()[:-100])
    damaged = shutil.copytree(deployed.checkpoint, tmp_path / "step-000007")
    (damaged / "COMPLETE").unlink()
    model = deployed.archive
    cases: list[tuple[list[object], str]] = [
        ([], "expected an archive or a checkpoint folder; see --help"),
        ([model], "expected either --prompt or --tokens"),
        ([model, "--tokens", "2", "--prompt", "x"], "expected either --prompt or --tokens"),
        ([model, "--tokens", "2,x"], 'expected a number after --tokens, got "x"'),
        ([model, "--tokens", ""], "expected token ids such as 5,6,7 after --tokens, got none"),
        ([model, "--tokens"], "expected a value after --tokens"),
        ([model, "--tokens", "2", "--colour"], "unknown argument --colour"),
        ([model, "--tokens", "2", "--threads", "-1"], "expected --threads to be at least 0"),
        ([model, "--tokens", "2", "--temperature", "nan"], "expected --temperature to be at least 0"),
        ([model, "--tokens", "2", "--max-new-tokens", "-1"], "expected --max-new-tokens to be at least 0"),
        ([model, "--tokens", "2", "--top-k", "-1"], "expected --top-k to be at least 0"),
        ([model, "--tokens", "2,520"], "expected token ids in [0, 520), got 520"),
        ([model, "--tokens", "2", "--top-p", "2"], "expected --top-p to be in (0, 1]"),
        ([model, "--tokens", "2", "--logits", tmp_path / "no" / "x"], "the logits could not be written"),
        ([tmp_path / "none.pt", "--tokens", "2"], "none.pt: expected an archive, found no file"),
        ([cut, "--tokens", "2"], "cut.pt: expected a TorchScript archive, found another kind of file, or a cut one"),
        ([damaged, "--tokens", "2"], "step-000007: half-written: it has no COMPLETE marker"),
    ]
    for arguments, message in cases:
        result = deploy(*arguments)
        assert result.returncode == 1, arguments
        last = result.stderr.splitlines()[-1]  # after the tokens per second, where the problem comes that late
        assert last.startswith("deploy: ")
        assert message in last
