"""The recipe from its command line: a whole folder, or one line of error and nothing."""

import os

import pytest

from glam_ext.data import TokenFolder, Tokenizer
from glam_ext.recipes import prepare_text


def run(folder, *arguments):
    return prepare_text.main([*arguments, "--vocab-size", "400", "--sequence-length", "32", "--out", str(folder)])


def test_makes_a_tokenizer_and_two_token_folders(tmp_path, text_file, capsys):
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"text": "Sir Walter Elliot,"}\n{"text": "\\ud83d\\ude00"}\n')
    assert run(tmp_path / "out", "--train", str(text_file), "--heldout", str(heldout)) == 0
    assert "2 documents, 22 bytes" in capsys.readouterr().out
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.model")
    assert tokenizer.vocab_size == 400
    for name, texts in (("train", [text_file.read_text()]), ("heldout", ["Sir Walter Elliot,", "\U0001f600"])):
        data = TokenFolder(tmp_path / "out" / name)
        data.check_tokenizer(tokenizer)
        assert [tokenizer.decode(document) for document in data.documents()] == texts
    assert sorted(os.listdir(tmp_path / "out")) == ["heldout", "tokenizer.json", "tokenizer.model", "train"]


def test_same_command_gives_the_same_bytes(tmp_path, text_file):
    for name in ("one", "two"):
        assert run(tmp_path / name, "--train", str(text_file)) == 0
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_existing_tokenizer_is_used(tmp_path, text_file, tokenizer):
    tokenizer.save(tmp_path / "mine.model")
    assert run(tmp_path / "out", "--train", str(text_file), "--tokenizer", str(tmp_path / "mine.model")) == 0
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.model").hash == tokenizer.hash


def test_overwrite(tmp_path, text_file, capsys):
    assert run(tmp_path / "out", "--train", str(text_file)) == 0
    assert run(tmp_path / "out", "--train", str(text_file)) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert run(tmp_path / "out", "--train", str(text_file), "--overwrite") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty corpus"), (b"a\n\xff", "line 2: expected UTF-8"), (b"too small", "Vocabulary size too high")],
)
def test_bad_text_is_one_line_and_leaves_nothing(tmp_path, capsys, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    assert run(tmp_path / "out", "--train", str(tmp_path / "bad.txt")) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("glam prepare: ")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["bad.txt"]


def test_bad_heldout_leaves_nothing(tmp_path, text_file, capsys):
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert run(tmp_path / "out", "--train", str(text_file), "--heldout", str(tmp_path / "bad.txt")) == 1
    assert "bad.txt: line 1" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["bad.txt", "sample.txt"]
