"""Token folders: what is written is read back; damage is found and named; a failed write leaves nothing behind."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from glam_ext.data import EOS, Corpus, DataError, TokenFolder, Tokenizer, pack, token_files, write_corpus
from glam_ext.data.atomic import atomic_folder


@pytest.fixture
def folder(tmp_path, text_file, tokenizer):
    write_corpus(tmp_path / "tokens", Corpus([text_file]), tokenizer, 64)
    return tmp_path / "tokens"


def test_round_trip(folder, text_file, tokenizer):
    data = TokenFolder(folder)
    text = text_file.read_text(encoding="utf-8")
    (document,) = data.documents()
    assert document[-1] == EOS
    assert tokenizer.decode(document) == text
    rows = list(pack([tokenizer.encode(text)], 64))
    assert len(data) == len(rows)
    for name, column in zip(("tokens", "targets", "segment_ids"), zip(*rows, strict=True), strict=True):
        np.testing.assert_array_equal(getattr(data, name), np.stack(column))
    picked = data.rows([2, 0, 2])
    np.testing.assert_array_equal(picked.targets_S, data.targets[[2, 0, 2]])
    assert picked.targets_S.dtype == np.int64

    manifest = data.manifest
    assert manifest.utf8_bytes == len(text.encode())
    assert manifest.num_targets == len(document)
    assert (manifest.num_documents, manifest.vocab_size) == (1, 600)
    assert manifest.sources[0]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_files_are_what_the_manifest_says_for_any_reader(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, dtype in (("tokens", "<u2"), ("targets", "<u2"), ("segment_ids", "<u2")):
        entry = manifest["files"][name]
        raw = (folder / entry["file"]).read_bytes()
        assert len(raw) == entry["bytes"] == 2 * manifest["num_rows"] * manifest["sequence_length"]
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
        array = np.frombuffer(raw, dtype).reshape(entry["shape"])
        if name == "segment_ids":
            assert np.count_nonzero(array) == manifest["num_targets"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_type_switches_where_ids_no_longer_fit(tmp_path, vocab_size, dtype):
    largest = vocab_size - 1
    counts = token_files._write_arrays(tmp_path, pack([[4, largest]], 4), 4, vocab_size)
    entry = counts["files"]["targets"]
    assert entry["dtype"] == dtype
    raw = np.frombuffer((tmp_path / "targets.bin").read_bytes(), np.dtype(dtype).newbyteorder("<"))
    assert raw.tolist() == [4, largest, EOS, 0]
    with pytest.raises(DataError, match=f"expected token ids below {vocab_size}, got {vocab_size}"):
        token_files._write_arrays(tmp_path, pack([[vocab_size]], 4), 4, vocab_size)


def test_more_rows_than_one_write(tmp_path, monkeypatch, text_file, tokenizer):
    monkeypatch.setattr(token_files, "ROWS_PER_WRITE", 3)
    write_corpus(tmp_path / "tokens", Corpus([text_file]), tokenizer, 64)
    data = TokenFolder(tmp_path / "tokens")
    assert len(data) > 6
    (document,) = data.documents()
    assert tokenizer.decode(document) == text_file.read_text(encoding="utf-8")


def test_another_tokenizer_is_noticed(folder, sample_text, tokenizer):
    data = TokenFolder(folder)
    data.check_tokenizer(tokenizer)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        data.check_tokenizer(Tokenizer.train([sample_text[:20000]], 350))


@pytest.mark.parametrize("name", ["tokens.bin", "targets.bin", "segment_ids.bin", "manifest.json"])
def test_every_kind_of_damage_is_named(folder, name):
    path = folder / name
    raw = path.read_bytes()

    path.write_bytes(raw[:-5])
    with pytest.raises(DataError, match=rf"{name}: (expected \d+ bytes, got \d+|damaged)"):
        TokenFolder(folder, verify=False)

    for position in (0, len(raw) // 3, len(raw) // 2, len(raw) - 2):
        flipped = bytearray(raw)
        flipped[position] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=rf"{name}: .*(make it again|prepare the text again)"):
            TokenFolder(folder)

    path.unlink()
    with pytest.raises(DataError, match=rf"{name}: (missing|no such file)"):
        TokenFolder(folder)

    path.write_bytes(raw)
    TokenFolder(folder)


def test_edited_count_and_newer_format_are_refused(folder):
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"utf8_bytes": 5', '"utf8_bytes": 6', 1))
    assert path.read_text() != text
    with pytest.raises(DataError, match="does not match its own hash"):
        TokenFolder(folder)
    path.write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(DataError, match="expected format version 1, got 2"):
        TokenFolder(folder)


def test_existing_folder_is_refused_or_replaced_whole(folder, text_file, tokenizer):
    before = (folder / "manifest.json").read_text()
    with pytest.raises(DataError, match="exists and is not empty"):
        write_corpus(folder, Corpus([text_file]), tokenizer, 32)
    assert (folder / "manifest.json").read_text() == before
    write_corpus(folder, Corpus([text_file]), tokenizer, 32, overwrite=True)
    assert TokenFolder(folder).manifest.sequence_length == 32
    assert sorted(path.name for path in folder.parent.iterdir()) == ["sample.txt", "tokens"]


def test_failure_leaves_the_old_folder_and_nothing_else(folder, text_file, tokenizer):
    (folder.parent / "bad.txt").write_bytes(b"fine\n\xff")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=r"bad.txt: line 2"):
        write_corpus(folder, Corpus([text_file, folder.parent / "bad.txt"]), tokenizer, 64, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["bad.txt", "sample.txt", "tokens"]


def test_failed_rename_puts_the_old_folder_back(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename = type(folder).rename

    def failing(self, target):
        if self.name.endswith(".part"):
            raise OSError(5, "Input/output error", str(self))
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", failing)
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(folder, overwrite=True) as hidden:
        (hidden / "new").write_text("new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["sample.txt", "tokens"]


FULL_DISK = """
import resource, signal, sys
from glam_ext.data import Corpus, Tokenizer, write_corpus
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_corpus(sys.argv[1], Corpus([sys.argv[2]]), Tokenizer.load(sys.argv[3]), 64)
"""


def test_write_that_the_system_refuses_leaves_nothing(tmp_path, text_file, tokenizer):
    tokenizer.save(tmp_path / "tokenizer.model")
    before = sorted(os.listdir(tmp_path))
    arguments = [str(tmp_path / "tokens"), str(text_file), str(tmp_path / "tokenizer.model")]
    done = subprocess.run([sys.executable, "-c", FULL_DISK, *arguments], capture_output=True, text=True)
    assert done.returncode == 1
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert sorted(os.listdir(tmp_path)) == before
