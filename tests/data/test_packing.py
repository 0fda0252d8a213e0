"""Every target exactly once, each piece from BOS, padding only at the very end."""

import numpy as np
import pytest

from glam_ext.data import BOS, EOS, PAD, pack, unpack


def stacked(documents, sequence_length):
    rows = list(pack(documents, sequence_length))
    return tuple(np.stack(column) for column in zip(*rows, strict=True))


def test_by_hand():
    tokens, targets, segments = stacked([[10, 11], [20], [30, 31, 32, 33, 34]], 4)
    # 10 11 EOS | 20   EOS | 30 31   32 33 34 EOS ...
    assert targets.tolist() == [[10, 11, EOS, 20], [EOS, 30, 31, 32], [33, 34, EOS, PAD]]
    assert tokens.tolist() == [[BOS, 10, 11, BOS], [BOS, BOS, 30, 31], [BOS, 33, 34, PAD]]
    assert segments.tolist() == [[1, 1, 1, 2], [1, 2, 2, 2], [1, 1, 1, 0]]


def test_document_that_fills_its_row_exactly():
    tokens, targets, segments = stacked([[5, 6, 7], [8, 9, 10, 11]], 4)
    assert targets.tolist() == [[5, 6, 7, EOS], [8, 9, 10, 11], [EOS, PAD, PAD, PAD]]
    assert tokens.tolist() == [[BOS, 5, 6, 7], [BOS, 8, 9, 10], [BOS, PAD, PAD, PAD]]
    assert segments.tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0]]


@pytest.mark.parametrize("sequence_length", [1, 2, 7, 64])
def test_invariants(sequence_length):
    generator = np.random.default_rng(sequence_length)
    documents = [generator.integers(4, 99, size=n) for n in generator.integers(0, 40, size=60)]
    tokens, targets, segments = stacked(documents, sequence_length)

    # The real targets, row by row, are the documents with one EOS each: every one exactly once, in order.
    expected = np.concatenate([np.append(document, EOS) for document in documents])
    np.testing.assert_array_equal(targets[segments != 0], expected)
    unpacked = list(unpack(targets, segments))
    assert len(unpacked) == len(documents)
    for found, document in zip(unpacked, documents, strict=True):
        np.testing.assert_array_equal(found, np.append(document, EOS))

    # Inputs are BOS where a segment starts, else the target before; rows begin with segment 1; ids rise by one.
    starts = np.ones_like(segments, bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    shifted = np.concatenate([np.full((len(targets), 1), BOS), targets[:, :-1]], axis=1)
    real = segments != 0
    np.testing.assert_array_equal(tokens[real], np.where(starts, BOS, shifted)[real])
    assert (segments[:, 0] == 1).all()
    steps = np.diff(segments, axis=1)[real[:, 1:]]
    assert set(steps.tolist()) <= {0, 1}

    # Padding is only at the end of the last row.
    assert real[:-1].all()
    assert not np.diff(real[-1].astype(int)).clip(0).any()
    assert (tokens[~real] == PAD).all()
    assert (targets[~real] == PAD).all()


def test_nothing_gives_no_rows():
    assert list(pack([], 8)) == []


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"expected sequence_length in \[1, 65535\], got 0"):
        list(pack([[5]], 0))
    with pytest.raises(ValueError, match="without pad, eos and bos"):
        list(pack([[5, EOS, 6]], 8))
