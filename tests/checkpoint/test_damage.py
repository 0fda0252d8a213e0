"""Damaged, half-written and impossible folders: both languages refuse them by name, and `glam verify` finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glam_ext.checkpoint import CheckpointError, verify
from tests.checkpoint.helpers import CONFIG, assert_same_tensors, flip_bit, model_tensors, rewrite_manifest, save
from tests.checkpoint.layouts import ONE, save_layout, whole_state

pytestmark = pytest.mark.filterwarnings("error")


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


def test_verify_command(tmp_path, capsys):
    root = tmp_path / "run" / "checkpoints"
    save_layout(root, 1, ONE, whole_state())
    folder = save_layout(root, 2, ONE, whole_state())
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
