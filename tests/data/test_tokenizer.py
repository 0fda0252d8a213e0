"""Every text comes back exactly; the same text gives the same tokenizer; damaged files are refused."""

import random

import pytest
import sentencepiece

from glam_ext.data import BOS, EOS, PAD, UNK, DataError, Tokenizer

NASTY = [
    "",
    " ",
    "   leading and  repeated   and trailing  ",
    "\n",
    "\n\n\n a\n",
    "dos\r\nlines\r\n\r",
    "\ttabs\t\tand\vothers\f",
    "nul \0 inside\0",
    "\u2581 the symbol\u2581\u2581of sentencepiece \u2581",
    "<s></s><unk><pad><0x41>",
    "\ufeffbyte order mark",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "e\u0301 is not \u00e9, \u00a0 \u3000 \u2028 are not spaces",
    "\u4e2d\u6587\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\uffff\U0010ffff\ufffd",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {PAD, EOS, BOS, UNK} & set(ids)


def test_round_trip_of_random_characters_and_of_a_novel(tokenizer, sample_text):
    generator = random.Random(0)
    for _ in range(200):
        points = (generator.choice([generator.randrange(128), generator.randrange(0x110000)]) for _ in range(50))
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(sample_text)
    assert tokenizer.decode(ids) == sample_text
    assert len(ids) < len(sample_text) / 2  # the pieces are really used


def test_unigram_round_trip(sample_text):
    tokenizer = Tokenizer.train([sample_text[:20000]], vocab_size=400, kind="unigram")
    for text in [*NASTY, sample_text[20000:30000]]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_on_nasty_text(sample_text):
    documents = [*NASTY, "x" * 10_000, sample_text[:20000]]
    tokenizer = Tokenizer.train(documents, vocab_size=400, character_coverage=1.0)
    for text in documents:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_layout_of_the_vocabulary(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert tokenizer.vocab_size == 600
    assert [processor.id_to_piece(i) for i in range(6)] == ["<pad>", "</s>", "<s>", "<unk>", "\n", "<0x00>"]
    assert tokenizer.encode("\n") == [4]
    assert tokenizer.decode([BOS, *tokenizer.encode("word"), EOS, PAD]) == "word"


def test_lines_are_tokenised_alone(tokenizer, sample_text):
    lines = sample_text.split("\n")[:200]
    by_line = [token for i, line in enumerate(lines) for token in ([4] if i else []) + tokenizer.encode(line)]
    assert tokenizer.encode("\n".join(lines)) == by_line


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_and_the_hash_sees_differences(sample_text, kind):
    first, again = (Tokenizer.train([sample_text[:20000]], 350, kind) for _ in range(2))
    other = Tokenizer.train([sample_text[20000:40000]], 350, kind)
    assert first.model == again.model
    assert first.hash == again.hash != other.hash


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.model")
    loaded = Tokenizer.load(tmp_path / "tokenizer.model")
    assert (loaded.model, loaded.hash) == (tokenizer.model, tokenizer.hash)


def test_damaged_files_are_refused(tokenizer, sample_text, tmp_path):
    path = tmp_path / "tokenizer.model"
    tokenizer.save(path)
    path.write_bytes(tokenizer.model[:-100])
    with pytest.raises(DataError, match=r"tokenizer.model: (damaged|its pieces)"):
        Tokenizer.load(path)
    path.write_bytes(Tokenizer.train([sample_text[:20000]], 350).model)
    with pytest.raises(DataError, match=r"tokenizer.model: its pieces do not match the hash in tokenizer.json"):
        Tokenizer.load(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"tokenizer.model: "):
        Tokenizer.load(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer.json: damaged"):
        Tokenizer.load(path)
    path.with_suffix(".json").write_text('{"format": "glam-tokenizer", "format_version": 99}')
    with pytest.raises(DataError, match="expected format version 1, got 99"):
        Tokenizer.load(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"tokenizer.json: no such file"):
        Tokenizer.load(path)


def test_foreign_model_is_refused(tmp_path, sample_text):
    (tmp_path / "text").write_text(sample_text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300, minloglevel=2
    )
    with pytest.raises(DataError, match="expected the special ids"):
        Tokenizer((tmp_path / "m.model").read_bytes())


def test_bad_arguments(tokenizer, sample_text):
    with pytest.raises(DataError, match="corpus is empty"):
        Tokenizer.train(["", "\n\n"], 600)
    with pytest.raises(DataError, match=r"cannot make 60000 pieces from this text: Vocabulary size too high"):
        Tokenizer.train([sample_text[:5000]], 60000)
    with pytest.raises(DataError, match="expected a vocabulary above 261"):
        Tokenizer.train([sample_text], 200)
    with pytest.raises(DataError, match="expected kind bpe or unigram, got wordpiece"):
        Tokenizer.train([sample_text], 600, "wordpiece")
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(DataError, match=r"expected ids in \[0, 600\), got 600"):
        tokenizer.decode([600])
