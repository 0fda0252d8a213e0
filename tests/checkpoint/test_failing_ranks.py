"""What goes wrong on one rank ends the save or the load on every rank, by name, and leaves nothing half-written."""

from __future__ import annotations

import errno
import math
import os
import threading

import pytest
import torch

from glam_ext.checkpoint import CheckpointError, Piece, find_checkpoint, load_checkpoint, save_checkpoint
from glam_ext.checkpoint import folder as folder_module
from glam_ext.checkpoint import save as save_module
from tests.checkpoint.helpers import flip_bit, names
from tests.checkpoint.layouts import (
    CONFIG,
    FOUR,
    REPLICAS,
    TRAINER,
    assert_same_state,
    held_by,
    save_layout,
    whole_state,
)
from tests.checkpoint.thread_ranks import run_ranks, succeed

pytestmark = pytest.mark.filterwarnings("error")

STATE = whole_state()
WI = "layers.0.moe.wi"


def save_changed(root, change, layout=FOUR, step=2):
    """Saves with `change(rank, model, optimizer)` having had its way with what each rank holds."""

    def save(ranks):
        model, optimizer = held_by(layout, ranks.rank, STATE)
        change(ranks.rank, model, optimizer)
        return save_checkpoint(root, step, CONFIG, model, optimizer, TRAINER, 0, ranks)

    return run_ranks(math.prod(layout), save)


def assert_all_raise(results, message):
    """The same CheckpointError on every rank."""
    assert [type(result) for result in results] == [CheckpointError] * len(results), results
    assert len({str(result) for result in results}) == 1
    with pytest.raises(CheckpointError, match=message):
        raise results[0]


def assert_only_step_1_is_left(root):
    assert names(root) == ["step-000001"]
    got = load_checkpoint(root)
    assert got.step == 1
    assert_same_state((got.model, got.optimizer), STATE)


# --- what the ranks hold is not everything, exactly once


def lose_an_expert(rank, model, optimizer):
    if rank == 1:
        del model[WI]


def lose_optimizer_state(rank, model, optimizer):
    if rank == 3:
        del optimizer[f"{WI}.row_var"]


def shift_a_part(rank, model, optimizer):
    if rank == 1:
        model[WI] = Piece(model[WI].tensor, (4, 16, 24), (2, 0, 0))


def change_a_dtype(rank, model, optimizer):
    if rank == 1:
        model[WI] = Piece(model[WI].tensor.half(), (4, 16, 24), (1, 0, 0))


def change_a_shape(rank, model, optimizer):
    if rank == 1:
        optimizer[f"{WI}.row_var"] = Piece(torch.zeros(1, 16), (5, 16), (4, 0))


def give_local_experts_as_plain_tensors(rank, model, optimizer):
    """The way in which other trainers lose experts: every rank's tensor looks like a replica of the first."""
    model[WI] = model[WI].tensor


def leave_the_tensor(rank, model, optimizer):
    if rank == 1:
        model[WI] = Piece(model[WI].tensor, (4, 16, 24), (4, 0, 0))


def overlap_partly(rank, model, optimizer):
    if rank == 0:
        model[WI] = Piece(torch.zeros(2, 16, 24), (4, 16, 24), (0, 0, 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose_an_expert, rf"model tensor {WI} \[4, 16, 24\]: 384 of 1536 elements are lost; there are \[0:1, .*\] in "),
        (lose_optimizer_state, rf"optimizer tensor {WI}.row_var \[4, 16\]: 16 of 64 elements are lost"),
        (shift_a_part, rf"tensor {WI} .*: 384 of 1536 elements are lost; .*, \[2:3, .*\] in ranks 1, 2, "),
        (overlap_partly, rf"tensor {WI}: the part \[0:2, .*\] in rank 0 overlaps \[1:2, .*\] in rank 1"),
        (change_a_dtype, rf"tensor {WI} is F32 \[4, 16, 24\] in rank 0 and F16 \[4, 16, 24\] in rank 1"),
        (change_a_shape, rf"tensor {WI}.row_var is F32 \[4, 16\] in rank 0 and F32 \[5, 16\] in rank 1"),
        (
            give_local_experts_as_plain_tensors,
            rf"tensor {WI}: expected the whole shape \[4, 16, 24\] of the configuration, got \[1, 16, 24\] on rank 0",
        ),
        (leave_the_tensor, rf"tensor {WI} has a part \[1, 16, 24\] at \[4, 0, 0\] that is not inside \[4, 16, 24\]"),
    ],
)  # fmt: skip
def test_parts_that_are_not_everything_once_are_refused(tmp_path, change, message):
    save_layout(tmp_path, 1, FOUR, STATE)
    assert_all_raise(
        save_changed(tmp_path, change), f"step-000002: nothing was saved: .*{message}.*; give save_checkpoint"
    )
    assert_only_step_1_is_left(tmp_path)


def test_a_lost_replica_loses_nothing(tmp_path):
    def change(rank, model, optimizer):
        if rank == 2:  # rank 0 holds the same
            model.clear()
            optimizer.clear()

    save_changed(tmp_path, change, REPLICAS)
    got = load_checkpoint(tmp_path)
    assert_same_state((got.model, got.optimizer), STATE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda rank: {"step": rank}, "expected the same step on every rank, got 0 on rank 0 and 1 on rank 1"),
        (lambda rank: {"keep": rank}, "expected the same keep on every rank"),
        (lambda rank: {"config": CONFIG if rank == 0 else CONFIG.preset("tiny")}, "expected the same configuration"),
    ],
)
def test_ranks_that_disagree_are_refused(tmp_path, arguments, message):
    def save(ranks):
        rest = {"step": 1, "config": CONFIG, "keep": 0, **arguments(ranks.rank)}
        return save_checkpoint(tmp_path, model_tensors={}, optimizer_tensors={}, trainer_state={}, ranks=ranks, **rest)

    for result in run_ranks(2, save):
        with pytest.raises(ValueError, match=message):
            raise result
    assert names(tmp_path) == []


def test_a_wrong_argument_on_one_rank_ends_the_save_on_all(tmp_path):
    def save(ranks):
        model = {"x": torch.zeros(2, dtype=torch.complex64 if ranks.rank == 1 else torch.float32)}
        return save_checkpoint(tmp_path, 1, CONFIG, model, {}, {}, 0, ranks)

    results = run_ranks(3, save)
    with pytest.raises(ValueError, match=r"tensor x: expected one of the dtypes int64, .*, got torch.complex64"):
        raise results[1]
    for rank in (0, 2):
        with pytest.raises(CheckpointError, match=r"rank 1: ValueError: tensor x: expected one of the dtypes"):
            raise results[rank]
    assert names(tmp_path) == []


# --- a rank that cannot write


def no_space(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", range(4))
def test_a_rank_that_cannot_write(tmp_path, monkeypatch, failing):
    save_layout(tmp_path, 1, FOUR, STATE)
    real = save_module.write_tensor_file

    def write(file, *arguments):
        (no_space if f"-{failing + 1:05d}-of-" in file.name else real)(file, *arguments)

    monkeypatch.setattr(save_module, "write_tensor_file", write)
    message = rf"^rank {failing}: .*step-000002: the checkpoint could not be saved: .*No space left.*; make room in"
    assert_all_raise(save_changed(tmp_path, lambda *held: None), message)
    assert_only_step_1_is_left(tmp_path)
    monkeypatch.undo()
    save_layout(tmp_path, 2, FOUR, STATE, keep=1)
    assert names(tmp_path) == ["step-000002"]


def test_several_ranks_that_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setattr(save_module, "write_tensor_file", no_space)
    assert_all_raise(save_changed(tmp_path, lambda *held: None), "No space left on device; make room")
    assert names(tmp_path) == []


def test_a_full_disk(small_disk):
    """The kernel's own word, on whichever ranks it hits; where it hits all of them alike, none is named."""
    root = small_disk / "checkpoints"
    save_layout(root, 1, FOUR, STATE)

    def grow(rank, model, optimizer):
        optimizer["big"] = Piece(torch.zeros(100_000), (400_000,), (100_000 * rank,))

    message = r"^(rank \d: )?\S.*step-000002: .*No space left on device; make room"
    assert_all_raise(save_changed(root, grow), message)
    assert_only_step_1_is_left(root)
    save_layout(root, 2, FOUR, STATE, keep=1)
    assert names(root) == ["step-000002"]


def test_a_sync_that_fails_anywhere(tmp_path, monkeypatch):
    """Of 2 ranks: config.json, four tensor files, trainer.json, the manifest, two folders, the marker, its folder."""
    syncs = 11
    save_layout(tmp_path, 1, (2, 1, 1), STATE)
    real, lock, calls = os.fsync, threading.Lock(), []
    for failing in range(1, syncs + 1):
        calls.clear()

        def fsync(descriptor, failing=failing):
            with lock:
                calls.append(descriptor)
                number = len(calls)
            if number == failing:
                no_space()
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        assert_all_raise(
            save_changed(tmp_path, lambda *held: None, (2, 1, 1)), r"^rank [01]: .*No space left on device"
        )
        monkeypatch.setattr(os, "fsync", real)
        assert_only_step_1_is_left(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append(descriptor), real(descriptor)))
    calls.clear()
    save_layout(tmp_path, 2, (2, 1, 1), STATE)
    assert len(calls) == syncs


def test_an_interrupt_on_one_rank(tmp_path, monkeypatch):
    save_layout(tmp_path, 1, FOUR, STATE)
    real = save_module.write_tensor_file

    def write(file, *arguments):
        if "-00003-of-" in file.name:
            raise KeyboardInterrupt
        real(file, *arguments)

    monkeypatch.setattr(save_module, "write_tensor_file", write)
    results = save_changed(tmp_path, lambda *held: None)
    assert type(results[2]) is KeyboardInterrupt
    for rank in (0, 1, 3):
        with pytest.raises(CheckpointError, match=r"^rank 2: KeyboardInterrupt"):
            raise results[rank]
    monkeypatch.undo()
    assert_only_step_1_is_left(tmp_path)


def test_a_folder_that_the_ranks_do_not_share(tmp_path):
    """Every rank on a disk of its own, under the same name."""

    def save(ranks):
        model, optimizer = held_by(FOUR, ranks.rank, STATE)
        return save_checkpoint(tmp_path / f"node{ranks.rank // 2}", 1, CONFIG, model, optimizer, TRAINER, 0, ranks)

    message = (
        r"rank 2: .*rank 0 made this folder and it is not visible here; put the run's folder on a file system that"
    )
    assert_all_raise(run_ranks(4, save), message)
    assert names(tmp_path) == ["node0"]
    assert names(tmp_path / "node0") == []


def test_files_that_rank_0_does_not_see(tmp_path, monkeypatch):
    real_entry = save_module.files.entry_of

    def entry_of(file):
        entry = real_entry(file)
        if file.name == "optimizer-00002-of-00004.safetensors":
            file.unlink()
        return entry

    monkeypatch.setattr(save_module.files, "entry_of", entry_of)
    message = r"rank 0: .*optimizer-00002-of-00004.safetensors: was written with \d+ bytes by its rank and is not here"
    assert_all_raise(save_changed(tmp_path, lambda *held: None), message)
    assert names(tmp_path) == []


def test_a_good_folder_of_the_same_step_is_not_replaced(tmp_path):
    save_layout(tmp_path, 2, FOUR, STATE)
    assert_all_raise(save_changed(tmp_path, lambda *held: None), "rank 0: .*a good checkpoint of this step exists")


# --- finding and loading


def find(path, world_size=4, **keywords):
    return run_ranks(world_size, lambda ranks: find_checkpoint(path, ranks=ranks, **keywords))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("file", ["model-00002-of-00004.safetensors", "optimizer-00004-of-00004.safetensors"])
def test_a_damaged_shard(tmp_path, file):
    save_layout(tmp_path, 1, FOUR, STATE)
    folder = save_layout(tmp_path, 2, FOUR, STATE)
    flip_bit(folder / file, -1)
    with pytest.warns(UserWarning, match=rf"skipping a checkpoint: rank \d: .*{file}: damaged: its SHA-256") as warned:
        found = succeed(4, lambda ranks: find_checkpoint(tmp_path, ranks=ranks))
    assert {verified.path.name for verified in found} == {"step-000001"}
    assert len(warned) == 1  # of rank 0 alone
    assert_all_raise(find(folder), rf"rank \d: .*{file}: damaged: its SHA-256 is not the one in the manifest")
    (folder / file).unlink()
    assert_all_raise(find(folder), rf"^/.*{file}: missing")  # which every rank sees


@pytest.mark.filterwarnings("error")
def test_a_warning_made_an_error_is_one_on_every_rank(tmp_path):
    save_layout(tmp_path, 1, FOUR, STATE)
    flip_bit(save_layout(tmp_path, 2, FOUR, STATE) / "model-00002-of-00004.safetensors", -1)
    first, *others = find(tmp_path)
    assert isinstance(first, UserWarning)
    assert_all_raise(others, "^rank 0: UserWarning: skipping a checkpoint")


@pytest.mark.filterwarnings("default")
def test_a_folder_that_one_rank_finds_bad_is_bad_for_all(tmp_path, monkeypatch):
    save_layout(tmp_path, 1, FOUR, STATE)
    save_layout(tmp_path, 2, FOUR, STATE)
    real, victim = folder_module.check_file, []

    def check_file(file, entry, hashes):
        if file.parent.name == "step-000002" and (victim or [threading.get_ident()]) == [threading.get_ident()]:
            victim[:] = [threading.get_ident()]
            raise OSError(errno.EIO, "Input/output error")
        real(file, entry, hashes)

    monkeypatch.setattr(folder_module, "check_file", check_file)
    with pytest.warns(UserWarning, match=r"rank \d: .*step-000002: cannot be read .*Input/output error"):
        found = succeed(4, lambda ranks: find_checkpoint(tmp_path, ranks=ranks))
    assert {verified.path.name for verified in found} == {"step-000001"}


def test_nothing_to_find(tmp_path):
    assert_all_raise(find(tmp_path), "has no checkpoint")
    assert_all_raise(find(tmp_path / "absent"), "not a folder; give the path")


def test_ranks_that_see_different_folders(tmp_path):
    for node, seed in ((0, 1), (1, 2)):
        save_layout(tmp_path / f"node{node}", 1, FOUR, whole_state(seed))
    results = run_ranks(2, lambda ranks: find_checkpoint(tmp_path / f"node{ranks.rank}" / "step-000001", ranks=ranks))
    for result in results:
        with pytest.raises(CheckpointError, match="the ranks see different folders; put it on a file system that all"):
            raise result


def test_a_load_that_fails_on_one_rank(tmp_path):
    save_layout(tmp_path, 1, FOUR, STATE)

    def load(ranks):
        part = (lambda name, shape: (slice(0, 99),) if name == WI else None) if ranks.rank == 1 else None
        return load_checkpoint(tmp_path, part=part, ranks=ranks)

    results = run_ranks(2, load)
    with pytest.raises(ValueError, match=f"tensor {WI}: expected a slice inside dimension 0"):
        raise results[1]
    with pytest.raises(CheckpointError, match=f"rank 1: ValueError: tensor {WI}: expected a slice"):
        raise results[0]
