"""glam export, glam generate and glam tokenizer as they are called."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from glam_ext import __main__ as command
from glam_ext.data import Tokenizer
from glam_ext.export import load_archive
from glam_ext.generate import generate
from glam_ext.model import GLaM
from glam_ext.recipes import export as export_recipe
from glam_ext.recipes import generate as generate_recipe
from tests.deployment.conftest import Deployed

TEXT = "It is a truth \u2581caf\u00e9"


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("other") / "other.model"
    Tokenizer.train(["some other text of other words, again and again " * 50], 300).save(file)
    return file


def test_commands_are_there() -> None:
    assert {"generate", "export", "tokenizer"} <= command.available().keys()


@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_export(deployed: Deployed, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.pt"
    arguments = [str(getattr(deployed, source)), "--out", str(out), "--tokenizer", str(deployed.tokenizer_file)]
    assert command.main(["export", *arguments]) == 0
    assert "step-000007" in capsys.readouterr().out
    assert out.read_bytes() == deployed.archive.read_bytes()


def test_export_without_a_tokenizer(deployed: Deployed, tmp_path: Path) -> None:
    assert export_recipe.main([str(deployed.run), "--out", str(tmp_path / "model.pt")]) == 0
    assert load_archive(tmp_path / "model.pt").tokenizer is None


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 3}])
def test_generate_text(deployed: Deployed, sampling: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [item for key, value in sampling.items() for item in (f"--{key.replace('_', '-')}", str(value))]
    arguments = [str(deployed.run), "--tokenizer", str(deployed.tokenizer_file), "--prompt", TEXT]
    assert generate_recipe.main([*arguments, "--max-new-tokens", "40", *flags]) == 0
    printed = capsys.readouterr()
    prompt = [2, *deployed.tokenizer.encode(TEXT)]
    (new,) = generate(deployed.model, [prompt], 40, **sampling)  # type: ignore[arg-type]
    whole = deployed.tokenizer.decode([token for token in prompt + new if token < 512])
    assert printed.out == whole + "\n"
    assert whole.startswith(TEXT)
    assert f"{len(new)} tokens in " in printed.err
    assert "tokens per second" in printed.err


def test_generate_tokens(deployed: Deployed, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_recipe.main([str(deployed.checkpoint), "--tokens", "2,7,9", "--max-new-tokens", "5"]) == 0
    (new,) = generate(deployed.model, [[2, 7, 9]], 5)
    assert capsys.readouterr().out == ",".join(map(str, new)) + "\n"


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_packed_weights(deployed: Deployed, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tokens", "2,7,9", "--max-new-tokens", "5", "--temperature", "0", "--weights", weights]
    assert generate_recipe.main([str(deployed.checkpoint), *arguments]) == 0
    prepared = GLaM.from_checkpoint(deployed.checkpoint).prepare_for_inference(weights)
    (new,) = generate(prepared, [[2, 7, 9]], 5, temperature=0.0)
    assert capsys.readouterr().out == ",".join(map(str, new)) + "\n"
    out = tmp_path / "model.pt"
    assert export_recipe.main([str(deployed.run), "--out", str(out), "--weights", weights]) == 0
    assert f"{weights} weights" in capsys.readouterr().out
    assert out.stat().st_size < 0.6 * deployed.archive.stat().st_size
    lengths = torch.tensor([3], dtype=torch.int32)
    found, _ = load_archive(out).module.generate(torch.tensor([[2, 7, 9]]), lengths, 5, 0.0, 0, 1.0, 0, [1])
    assert found[0, : len(new)].tolist() == new


def test_problems_end_in_one_line(
    deployed: Deployed, other_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(deployed.run), str(tmp_path / "model.pt")
    cases = [
        (["export", run, "--out", out, "--tokenizer", str(other_tokenizer)], "is not the tokenizer that the model was"),
        (["export", str(tmp_path), "--out", out], "has no checkpoint"),
        (["export", run, "--out", str(tmp_path / "no" / "m.pt")], "No such file or directory"),
        (["generate", run, "--tokens", "2,9999"], "expected the ids of prompt 0 to be in [0, 520), got 9999"),
        (["generate", run, "--tokens", "2", "--top-p", "7"], "expected top_p to be in (0, 1]"),
        (
            ["generate", run, "--prompt", "x", "--tokenizer", str(other_tokenizer)],
            "is not the tokenizer that the model",
        ),
        (["generate", run, "--prompt", "x", "--tokenizer", str(tmp_path / "no.model")], "no such file"),
        (["tokenizer", "train", str(tmp_path / "no.txt"), "--out", out], "no.txt"),
    ]
    for arguments, message in cases:
        assert command.main(arguments) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith(f"glam {arguments[0]}: ")
        assert message in printed.err
        assert printed.err.count("\n") == 1
        assert printed.out == ""
    assert not Path(out).exists()
    with pytest.raises(SystemExit):
        command.main(["generate", run, "--prompt", "x"])
    assert "--prompt needs --tokenizer FILE.model" in capsys.readouterr().err


class Bytes:
    """Standard input of some bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)

    def read(self) -> str:
        return self.buffer.read().decode()


def test_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    model = str(tmp_path / "t.model")
    assert command.main(["tokenizer", "train", str(tmp_path / "a.txt"), "--vocab-size", "290", "--out", model]) == 0
    assert b"290 pieces" in capfdbinary.readouterr().out
    text = "  the fox\r\n\n\u2581 caf\u00e9 \U0001f98a\t".encode()
    monkeypatch.setattr(sys, "stdin", Bytes(text))
    assert command.main(["tokenizer", "encode", model]) == 0
    ids = capfdbinary.readouterr().out
    assert [int(token) for token in ids.split()] == Tokenizer.load(model).encode(text.decode())
    monkeypatch.setattr(sys, "stdin", Bytes(ids))
    assert command.main(["tokenizer", "decode", model]) == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out == text

    for action, wrong, message in (
        ("encode", b"\xff\xfe", b"standard input is not UTF-8"),
        ("decode", b"5 six", b"expected token ids on standard input"),
        ("decode", b"290", b"expected ids in [0, 290), got 290"),
    ):
        monkeypatch.setattr(sys, "stdin", Bytes(wrong))
        assert command.main(["tokenizer", action, model]) == 1
        assert message in capfdbinary.readouterr().err
