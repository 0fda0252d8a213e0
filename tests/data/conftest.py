"""A tokenizer of 600 pieces and a few documents, small enough for every test."""

import pytest

from glam_ext.data import Corpus, Tokenizer


@pytest.fixture(scope="session")
def sample_text() -> str:
    """The first 100,000 characters of the held-out novel."""
    return "".join(Corpus(["austen:heldout"]))[:100_000]


@pytest.fixture(scope="session")
def tokenizer(sample_text: str) -> Tokenizer:
    return Tokenizer.train([sample_text], vocab_size=600)


@pytest.fixture
def text_file(tmp_path, sample_text):
    path = tmp_path / "sample.txt"
    path.write_text(sample_text[:5000], encoding="utf-8")
    return path
