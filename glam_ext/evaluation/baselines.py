"""python -m glam_ext.evaluation.baselines --train SOURCE --heldout SOURCE --data FOLDER

Bits per byte of held-out text without a neural network, to set beside a model's:
    xz                 `xz -9e` on the held-out text alone
    xz with training   what the held-out text adds to the compressed training text, with a window that reaches all of it
    Kneser-Ney 5-gram  interpolated modified Kneser-Ney over the same tokens, every token and one EOS per document once

The n-gram model sees the whole document before a token; a model's evaluation resets its context at every row start. So
the comparison favours the n-gram a little, by the tokens it sees at row starts.

Kneser-Ney as Chen and Goodman (1998), section 3: for a context u of k-1 tokens and counts c_k,
    p_k(w | u) = max(c_k(u w) - D_k(c_k(u w)), 0) / sum_v c_k(u v) + gamma(u) p_{k-1}(w | u without its first token),
c_5 = occurrences, c_k = number of different tokens seen before (u w) for k < 5, three discounts per order from the
counts of counts, gamma(u) what the discounts took from u, p_0 = 1 / V. A context never seen is left out.
"""

from __future__ import annotations

import argparse
import lzma
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glam_ext.data import BOS, Corpus, TokenFolder

Ids = NDArray[np.int64]

MIN_WINDOW, MAX_WINDOW = 1 << 26, 3 << 29  # xz: 64 MiB is that of preset 9, 1.5 GiB the format's largest


def xz_bits_per_byte(text: bytes) -> float:
    """Bits of `xz -9e` per byte of text, container included."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def xz_bits_per_byte_after(prefix: bytes, text: bytes) -> float:
    """Bits that `text` adds to the compressed `prefix`, per byte of text; both at `xz -9e` with a window over both."""
    window = min(max(len(prefix) + len(text), MIN_WINDOW), MAX_WINDOW)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    alone, together = (len(lzma.compress(part, filters=filters)) for part in (prefix, prefix + text))
    return 8 * (together - alone) / len(text)


@dataclass(frozen=True)
class Order:
    """The k-grams of one order. A k-gram's key is context id * V + token; the context id indexes total and gamma."""

    keys: Ids  # sorted
    mass: NDArray[np.float64]  # of each key: (count - discount) / total of its context
    total: Ids  # of each context: sum of counts, 0 if nothing was ever predicted from it
    gamma: NDArray[np.float64]  # of each context: the mass left to the lower order


class KneserNey:
    """An interpolated modified Kneser-Ney n-gram model over token ids in [0, vocab_size)."""

    def __init__(self, documents: Iterable[Sequence[int] | Ids], vocab_size: int, order: int = 5) -> None:
        """Count the documents; each must end in its EOS and have no BOS. The context of a first token is all BOS."""
        self.vocab_size, self.order = vocab_size, order
        padded = [self._pad(document) for document in documents]
        if not padded:
            raise ValueError("KneserNey: expected at least one document")
        stream = np.concatenate(padded)
        starts = np.cumsum([0] + [len(document) for document in padded[:-1]])
        is_target = np.ones(len(stream), bool)
        for offset in range(order):
            is_target[starts + offset] = False
        targets = np.flatnonzero(is_target)

        # Contexts of length 0, 1, ...: the id of the one that ends at each position of the stream. Windows that reach
        # back over a document's start get ids too, but no target is ever predicted from one of them.
        self._contexts: list[Ids] = []
        context_ids = [np.zeros(len(stream), np.int64)]
        for _ in range(order - 1):
            keys = np.empty(len(stream), np.int64)
            keys[0], keys[1:] = stream[0], context_ids[-1][:-1] * vocab_size + stream[1:]
            unique, ids = np.unique(keys, return_inverse=True)
            self._contexts.append(unique)
            context_ids.append(ids)

        # From the highest order down: each different k-gram is one count for its suffix.
        self._orders: list[Order] = []
        ends = targets
        for length in range(order, 0, -1):
            num_contexts = len(self._contexts[length - 2]) if length > 1 else 1
            keys = context_ids[length - 1][ends - 1] * vocab_size + stream[ends]
            unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
            self._orders.insert(0, self._make_order(unique, counts, num_contexts))
            ends = ends[first]

    def log_probabilities(self, document: Sequence[int] | Ids) -> NDArray[np.float64]:
        """ln p of every token of a document (its EOS included), each from all of the document before it."""
        stream = self._pad(document)
        contexts = self._find_contexts(stream)
        at = np.arange(self.order, len(stream))
        return np.log(self._interpolate([ids[at - 1] for ids in contexts], stream[at]))

    def distribution(self, context: Sequence[int] | Ids) -> NDArray[np.float64]:
        """p(w | context) for every w: float64 [V]. The context is what came before in the document, maybe nothing."""
        stream = self._pad(context)
        contexts = self._find_contexts(stream)
        return self._interpolate([ids[-1:].repeat(self.vocab_size) for ids in contexts], np.arange(self.vocab_size))

    def _pad(self, document: Sequence[int] | Ids) -> Ids:
        ids = np.asarray(document, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(f"KneserNey: expected ids in [0, {self.vocab_size}), got {ids.min()} to {ids.max()}")
        # One BOS more than the longest context, so that a position before the first token exists in every order.
        return np.concatenate([np.full(self.order, BOS, np.int64), ids])

    def _make_order(self, keys: Ids, counts: Ids, num_contexts: int) -> Order:
        context = keys // self.vocab_size
        discounts = _discounts(counts)[np.minimum(counts, 3)]
        total = np.bincount(context, counts, num_contexts)
        taken = np.bincount(context, discounts, num_contexts)
        gamma = np.divide(taken, total, out=np.ones(num_contexts), where=total > 0)
        return Order(keys, (counts - discounts) / total[context], total.astype(np.int64), gamma)

    def _find_contexts(self, stream: Ids) -> list[Ids]:
        """For lengths 0 .. order-1, the id of the context that ends at each position; -1 where it was never seen."""
        found = [np.zeros(len(stream), np.int64)]
        for keys in self._contexts:
            before = np.concatenate([[-1 if len(found) > 1 else 0], found[-1][:-1]])
            found.append(np.where(before < 0, -1, _find(keys, before * self.vocab_size + stream)))
        return found

    def _interpolate(self, contexts: list[Ids], tokens: Ids) -> NDArray[np.float64]:
        probability = np.full(len(tokens), 1.0 / self.vocab_size)
        for table, context in zip(self._orders, contexts, strict=True):
            known = (context >= 0) & (table.total[context] > 0)
            index = _find(table.keys, context * self.vocab_size + tokens)
            mass = np.where(index >= 0, table.mass[index], 0.0)
            probability = np.where(known, mass + table.gamma[context] * probability, probability)
        return probability


def _discounts(counts: Ids) -> NDArray[np.float64]:
    """D(0) = 0, D(1), D(2), D(3 and more) from the counts of counts; 0.5, 1, 1.5 where these give no usable value."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == value)) for value in (1, 2, 3, 4))
    fallback = np.array([0.0, 0.5, 1.0, 1.5])
    if not (n1 and n2 and n3 and n4):
        return fallback
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    usable = (estimate > 0) & (estimate < np.arange(4))
    return np.where(usable, estimate, fallback)


def _find(keys: Ids, wanted: Ids) -> Ids:
    """Index of each wanted value in sorted keys, -1 where it is absent."""
    index = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[index] == wanted, index, -1)


def kneser_ney_bits_per_byte(train: TokenFolder, heldout: TokenFolder, order: int = 5) -> float:
    """Bits per UTF-8 byte of the held-out folder's text under a model of the training folder's tokens."""
    if train.manifest.tokenizer_hash != heldout.manifest.tokenizer_hash:
        raise ValueError(
            f"{heldout.folder}: was made with another tokenizer than {train.folder}; prepare them together"
        )
    model = KneserNey(train.documents(), train.manifest.vocab_size, order)
    nats = -sum(float(model.log_probabilities(document).sum()) for document in heldout.documents())
    return nats / (math.log(2) * heldout.manifest.utf8_bytes)


def compare(train_sources: Sequence[str], heldout_sources: Sequence[str], data: str | Path) -> dict[str, float]:
    """All baselines. `data` is the folder that prepare_text made from the same sources (train/ and heldout/ in it)."""
    train_text, heldout_text = ("".join(Corpus(names)).encode("utf-8") for names in (train_sources, heldout_sources))
    return {
        "xz -9e": xz_bits_per_byte(heldout_text),
        "xz -9e after the training text": xz_bits_per_byte_after(train_text, heldout_text),
        "Kneser-Ney 5-gram": kneser_ney_bits_per_byte(
            TokenFolder(Path(data, "train")), TokenFolder(Path(data, "heldout"))
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bits per byte of held-out text without a neural network.")
    parser.add_argument("--train", nargs="+", required=True, metavar="SOURCE")
    parser.add_argument("--heldout", nargs="+", required=True, metavar="SOURCE")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="made by prepare_text from the same sources")
    args = parser.parse_args(argv)
    for name, bits in compare(args.train, args.heldout, args.data).items():
        print(f"{bits:.3f} bits per byte   {name}")


if __name__ == "__main__":
    main()
