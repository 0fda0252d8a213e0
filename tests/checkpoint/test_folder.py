"""The checkpoint folder: round trip in both languages, the order of the writes, pruning, and every kind of damage."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glam_ext import _C
from glam_ext.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint, step_folders, verify
from glam_ext.checkpoint import save as save_module
from glam_ext.config import GLaMConfig
from tests.checkpoint.helpers import CONFIG, READERS, assert_same_tensors, model_tensors, optimizer_tensors, save

pytestmark = pytest.mark.filterwarnings("error")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture(params=list(READERS))
def read(request):
    return READERS[request.param]


# --- round trip


def test_layout(tmp_path):
    folder = save(tmp_path / "checkpoints", 123, tokens=5)
    assert folder == tmp_path / "checkpoints" / "step-000123"
    listed = ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json"]
    assert names(folder) == sorted(["COMPLETE", "manifest.json", *listed])
    assert (folder / "COMPLETE").read_bytes() == b""
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(entry["file"] for entry in manifest["files"]) == listed
    for entry in manifest["files"]:
        content = (folder / entry["file"]).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == _C.sha256(content)
    assert GLaMConfig.from_json((folder / "config.json").read_text()) == CONFIG


def test_round_trip(tmp_path, read):
    trainer = {"tokens": 2**40, "data": {"row": 7}, "rng": [1, 2**63], "note": "Gr\u00fc\u00dfe", "loss": 0.1}
    save(tmp_path, 3, seed=8, **trainer)
    content, warned = read(tmp_path)
    assert warned == []
    assert content["path"] == tmp_path / "step-000003"
    assert content["config"] == CONFIG
    assert_same_tensors(content["model"], model_tensors(8))
    assert_same_tensors(content["optimizer"], optimizer_tensors(8))
    assert content["trainer"] == {"step": 3, **trainer}


def test_tensors_of_any_layout(tmp_path, read):
    flat = torch.arange(12.0)
    tensors = {
        "transposed": flat.view(3, 4).t(),
        "slice a": flat[:6],
        "slice b": flat[6:],
        "same": flat[:6],
        "parameter": torch.nn.Parameter(flat.view(4, 3)),
    }
    save_checkpoint(tmp_path, 0, CONFIG, tensors, {}, {}, keep=1)
    content, _ = read(tmp_path)
    assert_same_tensors(content["model"], {name: tensor.detach() for name, tensor in tensors.items()})
    assert content["optimizer"] == {}


def test_several_tensor_files_are_joined_and_a_repeated_name_is_refused(tmp_path, read):
    folder = save(tmp_path, 1)
    _C.write_safetensors(folder / "model-00002.safetensors", {"more": torch.ones(2)})
    rewrite_manifest(folder)
    assert_same_tensors(read(tmp_path)[0]["model"], {**model_tensors(1), "more": torch.ones(2)})
    _C.write_safetensors(folder / "model-00003.safetensors", {"final_norm.scale": torch.ones(4)})
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"tensor final_norm.scale is also in another file"):
        read(folder)


def test_an_exported_model_needs_no_optimizer_and_any_folder_name(tmp_path, read):
    folder = save(tmp_path, 1).rename(tmp_path / "exported")
    (folder / "optimizer.safetensors").unlink()
    (folder / "trainer.json").unlink()
    rewrite_manifest(folder)
    content, _ = read(folder)
    assert content["optimizer"] == {}
    assert content["trainer"] == {}
    assert_same_tensors(content["model"], model_tensors(1))


@pytest.mark.parametrize(
    "named", ["run", "run/checkpoints", "run/checkpoints/step-000020", "run/checkpoints/step-000020/"]
)
def test_newest_is_found_from_run_root_or_folder(tmp_path, read, named):
    for step in (9, 20, 10):
        save(tmp_path / "run" / "checkpoints", step)
    (tmp_path / "run" / "checkpoints" / "step-000099.bak").mkdir()
    (tmp_path / "run" / "checkpoints" / "step-").mkdir()
    content, warned = read(f"{tmp_path}/{named}")
    assert content["trainer"]["step"] == 20
    assert warned == []


def test_a_million_steps_sort_by_number(tmp_path, read):
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    assert read(tmp_path)[0]["trainer"]["step"] == 1_000_000


# --- the order of the writes


def test_order_of_the_writes(tmp_path, monkeypatch):
    """write, fsync(file), fsync(folder), rename, fsync(parent), marker, fsync(marker), fsync(folder), deletions."""
    save(tmp_path, 1)
    log: list[tuple[str, str]] = []
    opened: dict[int, str] = {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename")}
    real_touch, real_save_file, real_write_text = Path.touch, save_module.save_file, Path.write_text
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

    def traced_save_file(tensors, path, *arguments, **keywords):
        log.append(("write", name_of(path)))
        real_save_file(tensors, path, *arguments, **keywords)

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
    monkeypatch.setattr(save_module, "save_file", traced_save_file)
    monkeypatch.setattr(shutil, "rmtree", traced_rmtree)
    save(tmp_path, 2, keep=1)
    monkeypatch.undo()

    files = ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"]
    content = [(action, f".tmp-step-000002/{file}") for file in files for action in ("write", "fsync")]
    # rmtree opens folders of its own; what it does inside is not at issue.
    assert [entry for entry in log if entry != ("open", "")] == [
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
    real_fsync = save_module._fsync
    monkeypatch.setattr(save_module, "_fsync", lambda path: (synced.append(str(path)), real_fsync(path)))
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

    monkeypatch.setattr(save_module, "_delete", refuse)
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

    monkeypatch.setattr(save_module, "save_file", interrupted)
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


# --- damage


def flip_bit(file: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1 << bit
    file.write_bytes(content)


def rewrite_manifest(folder: Path, **changes: object) -> None:
    files = [path for path in sorted(folder.iterdir()) if path.name not in ("manifest.json", "COMPLETE")]
    entries = [{"file": p.name, "size": p.stat().st_size, "sha256": _C.sha256(p.read_bytes())} for p in files]
    manifest = {"format": "glam-checkpoint", "version": 1, "files": entries, **changes}
    (folder / "manifest.json").write_text(json.dumps(manifest))


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "trainer.json", "manifest.json"]


def damage_by(kind: str, folder: Path) -> str:
    """Damages the folder; returns the path that the error must name."""
    action, _, file = kind.partition(" ")
    path = folder / file
    if action == "truncate":
        path.write_bytes(path.read_bytes()[:-2])
    elif action == "empty":
        path.write_bytes(b"")
    elif action == "append":
        path.write_bytes(path.read_bytes() + b"}")
    elif action == "flip-first":
        flip_bit(path, 0)
    elif action == "flip-last":
        flip_bit(path, -2)
    elif action == "remove":
        path.unlink()
    elif action == "unmark":
        (folder / "COMPLETE").unlink()
        return str(folder)
    return str(path)


ACTIONS = ["truncate", "empty", "append", "flip-first", "flip-last", "remove"]
DAMAGES = [f"{action} {file}" for file in FILES for action in ACTIONS]


@pytest.mark.parametrize("kind", [*DAMAGES, "unmark"])
def test_a_damaged_folder_is_refused_when_named_and_skipped_when_searching(tmp_path, read, kind):
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    named = damage_by(kind, folder)
    with pytest.raises(CheckpointError) as error:
        read(folder)
    assert named in str(error.value)
    assert "; use another checkpoint or copy this one again from its source" in str(error.value)

    content, warned = read(tmp_path)
    assert content["trainer"]["step"] == 1
    assert len(warned) == 1
    assert "skipping a checkpoint: " in warned[0]
    assert named in warned[0]


# A stride that is odd meets every position within a byte; the slow tier flips every bit.
@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", FILES)
def test_no_flipped_bit_changes_what_is_loaded(tmp_path, read, file, stride):
    """Refused, or (white space in the manifest) without effect."""
    folder = save(tmp_path, 1)
    path = folder / file
    whole = path.read_bytes()
    harmless = 0
    for bit in range(0, 8 * len(whole), stride):
        flip_bit(path, bit // 8, bit % 8)
        try:
            content, _ = read(folder)
        except CheckpointError:
            pass
        else:
            harmless += 1
            assert content["config"] == CONFIG
            assert content["trainer"] == {"step": 1}
            assert_same_tensors(content["model"], model_tensors(1))
        path.write_bytes(whole)
    assert harmless == 0 if file != "manifest.json" else harmless < 0.05 * 8 * len(whole) / stride


def test_sizes_alone_find_truncation_but_not_a_flipped_bit(tmp_path, read):
    folder = save(tmp_path, 1)
    flip_bit(folder / "model.safetensors", -1)
    assert read(folder, hashes=False)[0]["trainer"] == {"step": 1}
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged: its SHA-256 is not the one in the man"):
        read(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors: damaged: it has 0 bytes, the manifest says \d+"):
        read(folder, hashes=False)


def test_a_safetensors_file_that_was_never_whole_is_refused(tmp_path, read):
    folder = save(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"nonsense that the manifest vouches for")
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"written in checkpoint format 2, this program reads up to format 1; use a newer glam_ext"),
        ({"version": 0}, "expected a version of at least 1"),
        ({"version": "1"}, "expected a version of at least 1"),
        ({"version": True}, "expected a version of at least 1"),
        ({"format": "tar"}, 'expected a manifest of the format "glam-checkpoint"'),
        ({"files": []}, r"expected config.json and a model\*.safetensors among its files"),
        ({"files": {}}, "expected the keys format, version and files"),
        ({"more": 1}, "expected the keys format, version and files"),
        ({"files": [{"file": "config.json"}]}, "an entry has no file, size and sha256"),
        ({"files": [{"file": "../config.json", "size": 1, "sha256": "0" * 64}]}, "an entry is impossible"),
        ({"files": [{"file": "a/b", "size": 1, "sha256": "0" * 64}]}, "an entry is impossible"),
        ({"files": [{"file": "a", "size": 1, "sha256": "0" * 63}]}, "an entry is impossible"),
        ({"files": [{"file": "a", "size": 1, "sha256": "0" * 64}] * 2}, "listed twice"),
        ({"files": [{"file": "a", "size": -1, "sha256": "0" * 64}]}, "an entry "),
    ],
)
def test_an_impossible_manifest_is_refused(tmp_path, read, changes, message):
    folder = save(tmp_path, 1)
    rewrite_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match=f"manifest.json: .*{message}"):
        read(folder)


def test_a_configuration_from_another_version_is_named(tmp_path, read):
    folder = save(tmp_path, 1)
    config = {**CONFIG.to_dict(), "future_field": 1}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r'config.json: .*unknown key "future_field".*use that version'):
        read(folder)


def test_nothing_to_load_is_said(tmp_path, read):
    with pytest.raises(CheckpointError, match=r"has no checkpoint \(no folder called step-000123\); check the path"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder; give the path"):
        read(tmp_path / "absent")
    for folder in (save(tmp_path, 1), save(tmp_path, 2)):
        (folder / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint; .*:\n.*step-000002.*\n.*step-000001"):
        read(tmp_path)


def test_an_unreadable_file_is_named(tmp_path, read):
    folder = save(tmp_path, 1)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        read(folder)


def test_nothing_is_unpickled(tmp_path, read):
    """A pickle in place of the weights is refused as a file that is not safetensors; its payload never runs."""
    folder = save(tmp_path, 1)
    canary = tmp_path / "ran"
    payload = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    (folder / "model.safetensors").write_bytes(payload)
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read(folder)
    assert not canary.exists()


# --- glam verify


def test_verify_command(tmp_path, capsys):
    root = tmp_path / "run" / "checkpoints"
    save(root, 1)
    folder = save(root, 2)
    assert verify.main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("good  ") == 2
    flip_bit(folder / "optimizer.safetensors", -1)
    assert verify.main([str(root)]) == 1
    text = capsys.readouterr().out
    assert "BAD   " in text
    assert str(folder / "optimizer.safetensors") in text
    assert text.count("good  ") == 1
    assert verify.main([str(root), "--sizes-only"]) == 0
    assert verify.main([str(root / "step-000001")]) == 0
    assert verify.main([str(tmp_path / "absent")]) == 1


def test_folders_are_readable_by_others(tmp_path):
    """What one user trains another can deploy: the files obey the umask, they are not private."""
    umask = os.umask(0o022)
    try:
        folder = save(tmp_path, 1)
    finally:
        os.umask(umask)
    for path in [folder, *folder.iterdir()]:
        assert path.stat().st_mode & stat.S_IROTH, path


def test_search_helpers(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 12)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-000012", "step-000001"]
    assert find_checkpoint(tmp_path).path.name == "step-000012"
