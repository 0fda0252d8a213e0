"""Saving: the order of the writes, pruning, leftovers, and saves that fail."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glam_ext.checkpoint import CheckpointError, files, load_checkpoint, save_checkpoint
from glam_ext.checkpoint import save as save_module
from tests.checkpoint.helpers import CONFIG, assert_same_tensors, flip_bit, model_tensors, names, save

pytestmark = pytest.mark.filterwarnings("error")


# --- the order of the writes


def test_order_of_the_writes(tmp_path, monkeypatch):
    """write, fsync(file), fsync(folder), rename, fsync(parent), marker, fsync(marker), fsync(folder), deletions."""
    save(tmp_path, 1)
    log: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename")}
    real_touch, real_write_tensor_file, real_write_text = Path.touch, save_module.write_tensor_file, Path.write_text
    real_rmtree = shutil.rmtree

    def name_of(path: object) -> str:
        return os.path.relpath(str(path), tmp_path)

    def traced_open(path, *arguments, **keywords):
        descriptor = real["open"](path, *arguments, **keywords)
        opened[descriptor] = name_of(path)
        return descriptor

    def traced_fsync(descriptor):
        log.append(("fsync", opened[descriptor]))
        real["fsync"](descriptor)

    def traced_rename(source, target):
        log.append(("rename", f"{name_of(source)} -> {name_of(target)}"))
        real["rename"](source, target)

    def traced_touch(path, *arguments, **keywords):
        log.append(("write", name_of(path)))
        real_touch(path, *arguments, **keywords)

    def traced_write_tensor_file(path, *arguments, **keywords):
        log.append(("write", name_of(path)))
        real_write_tensor_file(path, *arguments, **keywords)

    def traced_write_text(path, *arguments, **keywords):
        log.append(("write", name_of(path)))
        return real_write_text(path, *arguments, **keywords)

    def traced_rmtree(path, *arguments, **keywords):
        log.append(("delete", name_of(path)))
        real_rmtree(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", traced_open)
    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    monkeypatch.setattr(Path, "touch", traced_touch)
    monkeypatch.setattr(Path, "write_text", traced_write_text)
    monkeypatch.setattr(save_module, "write_tensor_file", traced_write_tensor_file)
    monkeypatch.setattr(shutil, "rmtree", traced_rmtree)
    save(tmp_path, 2, keep=1)
    monkeypatch.undo()

    files = ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"]
    content = [(action, f".tmp-step-000002/{file}") for file in files for action in ("write", "fsync")]
    assert log == [
        *content,
        ("fsync", ".tmp-step-000002"),
        ("rename", ".tmp-step-000002 -> step-000002"),
        ("fsync", "."),
        ("write", "step-000002/COMPLETE"),
        ("fsync", "step-000002/COMPLETE"),
        ("fsync", "step-000002"),
        ("rename", "step-000001 -> .tmp-delete-step-000001"),
        ("delete", ".tmp-delete-step-000001"),
    ]
    assert names(tmp_path) == ["step-000002"]


def test_a_new_root_is_made_durable(tmp_path, monkeypatch):
    synced: list[str] = []
    real_fsync = files.fsync
    monkeypatch.setattr(files, "fsync", lambda path: (synced.append(str(path)), real_fsync(path)))
    save(tmp_path / "run" / "checkpoints", 0)
    assert synced[:2] == [str(tmp_path), str(tmp_path / "run")]


# --- pruning and leftovers


def test_old_folders_are_pruned(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-000004", "step-000005"]
    save(tmp_path, 6, keep=0)
    assert names(tmp_path) == ["step-000004", "step-000005", "step-000006"]


def test_a_damaged_or_half_written_folder_does_not_count_as_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-000003" / "COMPLETE").unlink()
    (tmp_path / "step-000004" / "model.safetensors").write_bytes(b"short")
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]


def test_folders_of_a_later_step_are_left_alone(tmp_path):
    """After going back to an earlier step the newer folders neither count nor vanish."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-000015", "step-000020", "step-000030"]


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    save(tmp_path, 1)
    for leftover in (".tmp-step-000002", ".tmp-delete-step-000000"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    half = tmp_path / "step-000002"
    half.mkdir()
    (half / "config.json").write_text("{")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]
    assert load_checkpoint(tmp_path).step == 2


def test_a_damaged_folder_of_the_same_step_is_replaced_and_a_good_one_is_not(tmp_path):
    folder = save(tmp_path, 1, seed=5)
    with pytest.raises(CheckpointError, match="a good checkpoint of this step exists and is not replaced; move it"):
        save(tmp_path, 1, seed=6)
    assert_same_tensors(load_checkpoint(tmp_path).model, model_tensors(5))
    flip_bit(folder / "model.safetensors", -1)
    save(tmp_path, 1, seed=6)
    assert_same_tensors(load_checkpoint(tmp_path).model, model_tensors(6))
    assert names(tmp_path) == ["step-000001"]


def test_an_old_folder_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(files, "delete", refuse)
    with pytest.warns(UserWarning, match="step-000001: an old checkpoint could not be deleted: .*Permission denied"):
        save(tmp_path, 2, keep=1)
    assert load_checkpoint(tmp_path).step == 2


# --- a save that fails


def assert_only_step_1_is_left(root: Path) -> None:
    assert names(root) == ["step-000001"]
    assert_same_tensors(load_checkpoint(root).model, model_tensors(1))


def test_a_full_disk(small_disk):
    root = small_disk / "checkpoints"
    save(root, 1)
    big = {"embedding.weight": torch.zeros(1_000_000)}
    with pytest.raises(CheckpointError, match=r"step-000002: .*No space left on device.*make room in .*untouched"):
        save_checkpoint(root, 2, CONFIG, big, {}, {}, keep=1)
    assert_only_step_1_is_left(root)
    save(root, 2, keep=1)
    assert names(root) == ["step-000002"]


def test_a_file_size_limit_of_the_system(tmp_path):
    """The same failure where no disk can be mounted: the kernel refuses the write itself (EFBIG)."""
    save(tmp_path, 1)
    program = (
        "import sys, torch\n"
        "from glam_ext.checkpoint import save_checkpoint\n"
        "from tests.checkpoint.helpers import CONFIG\n"
        "save_checkpoint(sys.argv[1], 2, CONFIG, {'x': torch.zeros(1_000_000)}, {}, {}, keep=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "step-000002: the checkpoint could not be saved: " in done.stderr
    assert "File too large" in done.stderr
    assert_only_step_1_is_left(tmp_path)


@pytest.mark.parametrize("failing_call", range(1, 11))
def test_a_sync_that_fails_anywhere(tmp_path, monkeypatch, failing_call):
    """fsync is where a full or broken disk may first speak."""
    save(tmp_path, 1)
    calls = 0
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if failing_call == 10:
        save(tmp_path, 2)
        assert calls == 9  # so the range above covers every call
        return
    with pytest.raises(CheckpointError, match=r"step-000002: .*No space left on device"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert_only_step_1_is_left(tmp_path)


def test_an_interrupt_inside_a_save_cleans_up(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def interrupted(*arguments: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "write_tensor_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert_only_step_1_is_left(tmp_path)


def test_arguments_are_checked_before_anything_is_written(tmp_path):
    for step, keep in ((-1, 1), (1, -1)):
        with pytest.raises(ValueError, match="expected step and keep to be at least 0"):
            save(tmp_path, step, keep=keep)
    with pytest.raises(ValueError, match=r"expected trainer_state\['step'\] to be 2, got 1"):
        save_checkpoint(tmp_path, 2, CONFIG, {}, {}, {"step": 1}, keep=1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 2, rng=torch.zeros(2))
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, 2, loss=float("nan"))
    assert names(tmp_path) == []
