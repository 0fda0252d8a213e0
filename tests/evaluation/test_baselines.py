"""The n-gram baseline against a slow dictionary version of its definition; the compressors against known answers."""

import lzma
import math
import subprocess
from collections import defaultdict
from shutil import which

import numpy as np
import pytest

from glam_ext.data import BOS, EOS, Corpus, TokenFolder, Tokenizer, write_corpus
from glam_ext.evaluation import baselines
from glam_ext.evaluation.baselines import KneserNey, kneser_ney_bits_per_byte, xz_bits_per_byte, xz_bits_per_byte_after

VOCAB = 12


def documents(seed, count=4, length=150):
    """Sequences with repetitions of every length, so that all orders and discounts matter."""
    generator = np.random.default_rng(seed)
    phrases = [generator.integers(4, VOCAB, size=n) for n in (1, 1, 2, 3, 4, 6)]
    return [
        np.append(np.concatenate([phrases[generator.integers(6)] for _ in range(length // 3)]), EOS)
        for _ in range(count)
    ]


class SlowKneserNey:
    """Chen and Goodman's definition with dictionaries of tuples, one probability at a time."""

    def __init__(self, texts, order):
        self.order = order
        counts = defaultdict(int)
        for text in texts:
            padded = (BOS,) * (order - 1) + tuple(int(token) for token in text)
            for end in range(order, len(padded) + 1):
                counts[padded[end - order : end]] += 1
        self.counts = {order: dict(counts)}
        for length in range(order - 1, 0, -1):
            before = defaultdict(set)
            for gram in self.counts[length + 1]:
                before[gram[1:]].add(gram[0])
            self.counts[length] = {gram: len(tokens) for gram, tokens in before.items()}
        self.discounts = {}
        for length, table in self.counts.items():
            n = [sum(count == value for count in table.values()) for value in range(5)]
            values = [0.5, 1.0, 1.5]
            if all(n[1:]):
                y = n[1] / (n[1] + 2 * n[2])
                estimate = [value - (value + 1) * y * n[value + 1] / n[value] for value in (1, 2, 3)]
                values = [e if 0 < e < v else f for e, v, f in zip(estimate, (1, 2, 3), values, strict=True)]
            self.discounts[length] = values

    def probability(self, token, context):
        """context: the order-1 tokens before it, BOS where the document had not begun."""
        if len(context) == self.order:
            context = context[1:]
        length = len(context) + 1
        lower = 1 / VOCAB if length == 1 else self.probability(token, context[1:])
        table = {gram: count for gram, count in self.counts[length].items() if gram[:-1] == context}
        if not table:
            return lower
        discount = {gram: self.discounts[length][min(count, 3) - 1] for gram, count in table.items()}
        gram = (*context, token)
        own = table[gram] - discount[gram] if gram in table else 0.0
        return (own + sum(discount.values()) * lower) / sum(table.values())


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_kneser_ney_equals_its_definition(order):
    train, heldout = documents(0), documents(1, count=1)[0]
    heldout = np.concatenate(
        [heldout[:40], [4, 4, 4, 11, 4, 11, 11, 3, 5, 3], heldout[40:]]
    )  # unseen contexts and tokens
    slow = SlowKneserNey(train, order)
    padded = (BOS,) * (order - 1) + tuple(int(token) for token in heldout)
    expected = [slow.probability(padded[i], padded[i - order + 1 : i]) for i in range(order - 1, len(padded))]
    found = KneserNey(train, VOCAB, order).log_probabilities(heldout)
    assert len(found) == len(heldout)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-12)


def test_all_counts_of_counts_are_used_somewhere():
    """The comparison above covers estimated discounts and the fixed ones."""
    slow = SlowKneserNey(documents(0), 5)
    fixed = [values == [0.5, 1.0, 1.5] for values in slow.discounts.values()]
    assert any(fixed)
    assert not all(fixed)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_probabilities_sum_to_one(order):
    train = documents(0)
    model = KneserNey(train, VOCAB, order)
    contexts = [[], [4], train[0][:2], train[0][:20], train[0][:-1], [3, 3, 3, 3], [*train[1][:9], 3], [EOS], train[2]]
    for context in contexts:
        distribution = model.distribution(context)
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1, abs=1e-12)


def test_distribution_and_log_probabilities_agree():
    train, heldout = documents(0), documents(1, count=1)[0]
    model = KneserNey(train, VOCAB)
    expected = [model.distribution(heldout[:i])[token] for i, token in enumerate(heldout)]
    np.testing.assert_allclose(np.exp(model.log_probabilities(heldout)), expected, rtol=1e-14)


def test_documents_do_not_see_each_other():
    train = documents(0)
    together, swapped = KneserNey(train, VOCAB), KneserNey(train[::-1], VOCAB)
    heldout = documents(1, count=1)[0]
    np.testing.assert_allclose(together.log_probabilities(heldout), swapped.log_probabilities(heldout), rtol=1e-12)


def test_kneser_ney_refuses_bad_ids():
    with pytest.raises(ValueError, match=r"expected ids in \[0, 12\), got 4 to 12"):
        KneserNey([[4, 12]], VOCAB)
    with pytest.raises(ValueError, match="at least one document"):
        KneserNey([], VOCAB)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    text = "".join(Corpus(["austen:heldout"]))
    (folder / "train.txt").write_text(text[:60_000])
    (folder / "heldout.txt").write_text(text[60_000:70_000])
    tokenizer = Tokenizer.train([text[:60_000]], 400)
    for name in ("train", "heldout"):
        write_corpus(folder / name, Corpus([folder / f"{name}.txt"]), tokenizer, 64)
    return folder


def test_bits_per_byte_of_kneser_ney(prepared):
    train, heldout = TokenFolder(prepared / "train"), TokenFolder(prepared / "heldout")
    bits = kneser_ney_bits_per_byte(train, heldout)
    (document,) = heldout.documents()
    assert document[-1] == EOS
    assert len(document) == heldout.manifest.num_targets
    nats = -KneserNey(train.documents(), 400).log_probabilities(document).sum()
    assert bits == pytest.approx(nats / math.log(2) / 10_000, rel=1e-12)
    assert kneser_ney_bits_per_byte(train, heldout, order=1) > bits
    assert 1.5 < bits < 3.5


def test_xz_with_training_text_gains_and_covers_the_whole_prefix(monkeypatch):
    text = "".join(Corpus(["austen:heldout"])).encode()
    heldout, prefix = text[:20_000], text[20_000:120_000]
    alone, after = xz_bits_per_byte(heldout), xz_bits_per_byte_after(prefix, heldout)
    assert alone == 8 * len(lzma.compress(heldout, preset=9 | lzma.PRESET_EXTREME)) / 20_000
    assert after < alone
    # A copy at the far end of the prefix costs a few bytes per longest match (273); out of the window it costs all.
    far = heldout + np.random.default_rng(0).bytes(200_000)
    reached = xz_bits_per_byte_after(far, heldout)
    monkeypatch.setattr(baselines, "MAX_WINDOW", 65536)
    missed = xz_bits_per_byte_after(far, heldout)
    assert reached < 0.25
    assert missed > 0.9 * alone


@pytest.mark.skipif(which("xz") is None, reason="the xz program is not installed")
def test_xz_is_the_command(tmp_path):
    text = "".join(Corpus(["austen:heldout"])).encode()[:50_000]
    packed = subprocess.run(["xz", "-9e", "-c"], input=text, capture_output=True, check=True).stdout
    assert xz_bits_per_byte(text) == pytest.approx(8 * len(packed) / len(text), rel=2e-3)


def test_command(prepared, capsys):
    sources = ["--train", str(prepared / "train.txt"), "--heldout", str(prepared / "heldout.txt")]
    baselines.main([*sources, "--data", str(prepared)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("   ")[1] for line in lines] == ["xz -9e", "xz -9e after the training text", "Kneser-Ney 5-gram"]
    values = [float(line.split()[0]) for line in lines]
    assert values[0] > values[1] > values[2] > 0
