"""What a step reads depends on the seed and the global sample counter alone."""

import itertools

import numpy as np
import pytest
import torch

from glam_ext.data import BatchSampler, Corpus, DataError, TokenFolder, epoch_order, sequential_batches, write_corpus


@pytest.fixture
def data(tmp_path, text_file, tokenizer) -> TokenFolder:
    write_corpus(tmp_path / "tokens", Corpus([text_file]), tokenizer, 64)
    return TokenFolder(tmp_path / "tokens")


def take(sampler, count):
    return [sampler.next_batch() for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def joined(per_rank):
    """The batches of all ranks, put together again."""
    return [
        type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))
        for parts in zip(*per_rank, strict=True)
    ]


def test_shapes_types_and_weights(data):
    batch = BatchSampler(data, 4).next_batch()
    assert [tensor.dtype for tensor in batch] == [torch.int64, torch.int64, torch.float32, torch.int32]
    assert all(tensor.shape == (4, 64) for tensor in batch)
    assert torch.equal(batch.weights, (batch.segment_ids != 0).float())


def test_each_epoch_has_every_row_once_in_its_own_order(data):
    rows = {row.tobytes(): index for index, row in enumerate(np.asarray(data.targets, np.int64))}
    assert len(rows) == len(data)
    sampler = BatchSampler(data, 1, seed=3)
    orders = [[rows[sampler.next_batch().targets.numpy().tobytes()] for _ in range(len(data))] for _ in range(2)]
    assert sampler.epoch == 2.0
    for epoch, order in enumerate(orders):
        assert sorted(order) == list(range(len(data)))
        assert order == epoch_order(3, epoch, len(data)).tolist()
    assert orders[0] != orders[1]
    assert orders[0] != epoch_order(4, 0, len(data)).tolist()


def test_order_never_changes():
    assert epoch_order(0, 0, 8).tolist() == [4, 0, 1, 7, 6, 2, 5, 3]  # from splitmix64 on Python integers
    assert sorted(epoch_order(2**63, 5, 1000).tolist()) == list(range(1000))


def test_batches_run_over_the_end_of_an_epoch(data):
    size = len(data) - 3
    rows = [batch.targets for batch in take(BatchSampler(data, size, seed=1), 3)]
    alone = [batch.targets for batch in take(BatchSampler(data, 1, seed=1), 3 * size)]
    assert torch.equal(torch.cat(rows), torch.cat(alone))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_same_global_batch(data, world_size):
    per_rank = [take(BatchSampler(data, 12, seed=5, rank=rank, world_size=world_size), 5) for rank in range(world_size)]
    assert_same(joined(per_rank), take(BatchSampler(data, 12, seed=5), 5))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (3, 2), (2, 4)])
def test_resume_is_exact_whatever_the_number_of_ranks(data, before, after):
    uninterrupted = take(BatchSampler(data, 12, seed=5), 9)
    first = [BatchSampler(data, 12, seed=5, rank=rank, world_size=before) for rank in range(before)]
    for sampler in first:
        take(sampler, 4)
    states = [sampler.state_dict() for sampler in first]
    assert all(state == states[0] for state in states)
    second = [BatchSampler(data, 12, seed=5, rank=rank, world_size=after) for rank in range(after)]
    for sampler in second:
        sampler.load_state_dict(states[0])
    assert_same(joined([take(sampler, 5) for sampler in second]), uninterrupted[4:])


def test_resume_with_another_batch_size_continues_with_the_next_sample(data):
    sampler = BatchSampler(data, 6, seed=5)
    take(sampler, 2)
    other = BatchSampler(data, 4, seed=5)
    other.load_state_dict(sampler.state_dict())
    rows = torch.cat([batch.targets for batch in take(other, 3)])
    assert torch.equal(rows, torch.cat([batch.targets for batch in take(sampler, 2)]))


def test_foreign_state_is_refused(data, tmp_path, text_file, tokenizer):
    state = BatchSampler(data, 4, seed=1).state_dict()
    with pytest.raises(DataError, match="cannot resume, seed is 2 here and 1 in the checkpoint"):
        BatchSampler(data, 4, seed=2).load_state_dict(state)
    text_file.write_text(text_file.read_text(encoding="utf-8").replace("Elliot", "Elloit"), encoding="utf-8")
    write_corpus(tmp_path / "other", Corpus([text_file]), tokenizer, 64)
    with pytest.raises(DataError, match=r"cannot resume, (data_sha256|num_rows) is"):
        BatchSampler(TokenFolder(tmp_path / "other"), 4, seed=1).load_state_dict(state)


def test_unshuffled_is_in_order(data):
    batches = take(BatchSampler(data, 2, shuffle=False), 2)
    np.testing.assert_array_equal(torch.cat([batch.targets for batch in batches]).numpy(), data.targets[:4])


def test_iteration_is_endless(data):
    assert len(list(itertools.islice(BatchSampler(data, 4), 2 * len(data)))) == 2 * len(data)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 12, 600])
def test_evaluation_sees_every_row_once(data, batch_size, world_size):
    per_rank = [list(sequential_batches(data, batch_size, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in per_rank} == {-(-len(data) // batch_size)}
    assert all(batch.tokens.shape == (batch_size // world_size, 64) for batches in per_rank for batch in batches)
    whole = type(per_rank[0][0])(*(torch.cat(column) for column in zip(*joined(per_rank), strict=True)))
    for tensor, array in (
        (whole.tokens, data.tokens),
        (whole.targets, data.targets),
        (whole.segment_ids, data.segment_ids),
    ):
        np.testing.assert_array_equal(tensor[: len(data)].numpy(), array)
        assert not tensor[len(data) :].any()
    assert whole.weights.sum().item() == data.manifest.num_targets


def test_bad_arguments(data):
    with pytest.raises(ValueError, match="multiple of world_size = 2 above 0, got 3"):
        BatchSampler(data, 3, world_size=2)
    with pytest.raises(ValueError, match=r"expected rank in \[0, 2\), got 2"):
        BatchSampler(data, 4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="multiple of world_size = 2 above 0"):
        next(sequential_batches(data, 3, 0, 2))
