"""Documents come out as they are on disk; whatever cannot be read is named with its file and line."""

import hashlib
import json
import lzma
import re

import pytest

from glam_ext.data import Corpus, DataError
from glam_ext.data.corpus import AUSTEN_FOLDER

NASTY = "\ufeff  two\r\nlines\twith \u00a3 and \U0001f600\n\n"


def test_text_file_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(NASTY.encode())
    corpus = Corpus([path])
    assert list(corpus) == [NASTY]
    (record,) = corpus.records
    assert record.sha256 == hashlib.sha256(NASTY.encode()).hexdigest()
    assert (record.documents, record.utf8_bytes) == (1, len(NASTY.encode()))


def test_json_lines_skip_blank_lines_and_empty_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "one"}), "", json.dumps({"text": ""}), json.dumps({"text": NASTY, "id": 7})]
    path.write_text("\n".join(lines), encoding="utf-8")
    corpus = Corpus([path])
    assert list(corpus) == ["one", NASTY]
    assert corpus.records[0].documents == 2
    assert corpus.records[0].utf8_bytes == len(b"one") + len(NASTY.encode())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "b.jsonl.txt"])
def test_xz_gives_the_same_documents_and_hash(tmp_path, name):
    content = json.dumps({"text": "one"}).encode()
    (tmp_path / name).write_bytes(content)
    (tmp_path / f"{name}.xz").write_bytes(lzma.compress(content))
    plain, packed = Corpus([tmp_path / name]), Corpus([tmp_path / f"{name}.xz"])
    assert list(plain) == list(packed) == (["one"] if name == "a.jsonl" else [content.decode()])
    assert plain.records[0].sha256 == packed.records[0].sha256


def test_sources_keep_their_order(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert "".join(Corpus([tmp_path / "c.txt", tmp_path / "a.txt", tmp_path / "b.txt"])) == "cab"


def test_records_belong_to_a_complete_reading(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="not been read to its end"):
        Corpus([tmp_path / "a.txt"]).records  # noqa: B018


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\ncaf\xe9\n", "a.txt: line 3: expected UTF-8, found byte 0xE9"),
        ("a.txt", b"", "a.txt: empty corpus"),
        ("a.jsonl", b"\n\n", "a.jsonl: empty corpus"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', "a.jsonl: line 2: expected UTF-8, found byte 0xE9"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', 'a.jsonl: line 3: expected a JSON object {"text": ...}'),
        ("a.jsonl", b'{"text": 5}\n', 'a.jsonl: line 1: expected a JSON object with a string under "text"'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl: line 1: expected a JSON object with a string under "text"'),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl: line 1: the text has half of a surrogate pair (\\ud83d)"),
        ("a.txt.xz", lzma.compress(b"x" * 999)[:-9], "a.txt.xz: truncated or damaged xz file"),
        ("a.jsonl.xz", b"not xz", "a.jsonl.xz: truncated or damaged xz file"),
    ],
)
def test_bad_content_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        list(Corpus([path]))


def test_bad_sources_are_refused_before_reading(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match="at least one source"):
        Corpus([])
    with pytest.raises(DataError, match=r"nothere.txt: no such file"):
        Corpus([tmp_path / "nothere.txt"])
    with pytest.raises(DataError, match=r"is a folder"):
        Corpus([tmp_path])
    with pytest.raises(DataError, match=r"a.pdf: expected a name that ends in one of .txt"):
        Corpus([tmp_path / "a.pdf"])


def test_shipped_novels_are_those_their_readme_describes():
    readme = (AUSTEN_FOLDER / "README.md").read_text()
    corpora = {"train": Corpus(["austen"]), "held out": Corpus(["austen:heldout"])}
    seen = 0
    for use, corpus in corpora.items():
        assert "gutenberg" not in "".join(corpus).lower()
        for record in corpus.records:
            row = next(line for line in readme.splitlines() if record.name.removeprefix("austen/") in line)
            assert f"| {use} | {record.utf8_bytes:,} | `{record.sha256}` |" in row
            seen += 1
    assert seen == 6 == len(list(AUSTEN_FOLDER.glob("*.xz")))
    assert sum(path.stat().st_size for path in AUSTEN_FOLDER.iterdir()) <= 2_000_000
