"""`glam convert`: one file, the files of any number of ranks, torch.distributed.checkpoint; no bit is changed."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open

from glam_ext import __main__ as command
from glam_ext.checkpoint import (
    CheckpointError,
    convert_checkpoint,
    convert_to_dcp,
    find_checkpoint,
    load_checkpoint,
    verify,
)
from glam_ext.checkpoint import convert as convert_module
from glam_ext.checkpoint.convert import expert_range
from glam_ext.checkpoint.stored import StoredTensor
from glam_ext.model import GLaM
from tests.checkpoint.helpers import flip_bit, load_in_cpp, names, rewrite_manifest
from tests.checkpoint.layouts import (
    FOUR,
    ONE,
    REPLICAS,
    TRAINER,
    TWO_DIMENSIONS,
    UNEVEN_THREE,
    assert_same_state,
    held_by,
    load_layout,
    save_layout,
    whole_state,
)

pytestmark = pytest.mark.filterwarnings("error")

STATE = whole_state()


def assert_holds_the_state(folder):
    assert verify.main([str(folder)]) == 0
    got = load_checkpoint(folder)
    assert_same_state((got.model, got.optimizer), STATE)
    assert got.trainer == {"step": 1, **TRAINER}
    content, _ = load_in_cpp(folder)
    assert_same_state((content["model"], content["optimizer"]), STATE)


@pytest.mark.parametrize("layout", [ONE, FOUR, REPLICAS, TWO_DIMENSIONS, UNEVEN_THREE], ids=str)
def test_merge(tmp_path, layout, capsys):
    source = save_layout(tmp_path / "run" / "checkpoints", 1, layout, STATE)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    assert command.main(["convert", str(tmp_path / "run"), str(tmp_path / "new" / "merged")]) == 0
    merged = tmp_path / "new" / "merged"
    assert capsys.readouterr().out.startswith(f"{source} -> {merged}: 6 files, ")
    expected = [
        "COMPLETE",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    assert names(merged) == expected
    assert names(merged.parent) == ["merged"]
    assert_holds_the_state(merged)
    model = GLaM.from_checkpoint(merged)
    assert all(torch.equal(parameter, STATE[0][name]) for name, parameter in model.named_parameters())
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_a_merge_is_what_one_rank_would_have_saved(tmp_path):
    one = save_layout(tmp_path / "one", 1, ONE, STATE)
    merged = convert_checkpoint(find_checkpoint(save_layout(tmp_path / "four", 1, FOUR, STATE)), tmp_path / "merged")
    for file in one.iterdir():
        assert (merged / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 7])
def test_split_and_merge_again(tmp_path, num_ranks):
    source = save_layout(tmp_path, 1, ONE, STATE)
    assert command.main(["convert", str(source), str(tmp_path / "split"), "--ranks", str(num_ranks)]) == 0
    split = tmp_path / "split"
    files = [
        f"{s}-{r:05d}-of-{num_ranks:05d}.safetensors" for s in ("model", "optimizer") for r in range(1, num_ranks + 1)
    ]
    assert names(split) == sorted([*files, "COMPLETE", "config.json", "manifest.json", "trainer.json"])
    assert_holds_the_state(split)
    for rank, got in enumerate(load_layout(split, UNEVEN_THREE)):
        assert_same_state(got, held_by(UNEVEN_THREE, rank, STATE))
    again = convert_checkpoint(find_checkpoint(split), tmp_path / "again")
    for file in source.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_experts_are_split_and_the_rest_is_spread(tmp_path):
    source = save_layout(tmp_path, 1, ONE, STATE)
    split = convert_checkpoint(find_checkpoint(source), tmp_path / "split", 3)
    shapes, sizes = [], []
    for rank in range(1, 4):
        with safe_open(split / f"model-{rank:05d}-of-00003.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
        with safe_open(split / f"optimizer-{rank:05d}-of-00003.safetensors", "pt") as file:
            shapes[-1] |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        sizes.append(sum(file.stat().st_size for file in split.glob(f"*-{rank:05d}-of-*")))
    for name in ("layers.0.moe.wi", "layers.0.moe.wo", "layers.0.moe.wi.row_var", "layers.0.moe.wo.col_var"):
        assert [rank[name][0] for rank in shapes] == [2, 1, 1]
    for name in ("embedding.weight", "layers.0.moe.router", "step"):
        assert sum(name in rank for rank in shapes) == 1
    assert max(sizes) < 1.5 * min(sizes)


def test_expert_ranges():
    assert [expert_range(4, rank, 3) for rank in range(3)] == [(0, 2), (2, 3), (3, 4)]
    assert [expert_range(2, rank, 4) for rank in range(4)] == [(0, 1), (1, 2), (2, 2), (2, 2)]
    assert [expert_range(8, rank, 2) for rank in range(2)] == [(0, 4), (4, 8)]


def test_one_assembled_tensor_at_a_time(tmp_path, monkeypatch):
    source = find_checkpoint(save_layout(tmp_path, 1, FOUR, STATE))
    real, assembled = StoredTensor.read, []

    def read(self, *box):
        assert all(reference() is None for reference in assembled)
        tensor = real(self, *box)
        if len(self.parts) > 1:
            assembled.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", read)
    convert_checkpoint(source, tmp_path / "merged")
    assert len(assembled) >= 6


def test_an_exported_model_without_optimizer_and_trainer(tmp_path):
    source = save_layout(tmp_path, 1, ONE, STATE)
    (source / "optimizer.safetensors").unlink()
    (source / "trainer.json").unlink()
    rewrite_manifest(source)
    split = convert_checkpoint(find_checkpoint(source), tmp_path / "split", 2)
    assert not [name for name in names(split) if name.startswith(("optimizer", "trainer"))]
    got = load_checkpoint(split)
    assert_same_state((got.model, got.optimizer), (STATE[0], {}))
    assert got.trainer == {}


# --- torch.distributed.checkpoint


@pytest.mark.parametrize("layout", [ONE, FOUR, TWO_DIMENSIONS], ids=str)
def test_dcp_reads_the_same_tensors(tmp_path, layout, capsys):
    source = save_layout(tmp_path, 1, layout, STATE)
    assert command.main(["convert", str(source), str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    out = tmp_path / "dcp"
    assert capsys.readouterr().out.startswith(f"{source} -> {out}: ")
    state = {
        stem: {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}
        for stem, tensors in zip(("model", "optimizer"), STATE, strict=True)
    }
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        dcp.load(state, checkpoint_id=out, no_dist=True)
    assert_same_state((state["model"], state["optimizer"]), STATE)
    metadata = dcp.FileSystemReader(out).read_metadata().state_dict_metadata
    assert len(metadata) == sum(map(len, STATE))
    parts = {ONE: 1, FOUR: 4, TWO_DIMENSIONS: 4}[layout]
    assert len(metadata["model.layers.0.moe.wi"].chunks) == parts  # what was in parts still is
    assert json.loads((out / "trainer.json").read_text()) == {"step": 1, **TRAINER}
    assert (out / "config.json").read_text() == (source / "config.json").read_text()


def test_dcp_on_a_full_disk(tmp_path, small_disk):
    source = save_layout(tmp_path, 1, FOUR, STATE)
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    with pytest.raises(CheckpointError, match=r"out: the checkpoint could not be converted: .*No space left on device"):
        convert_to_dcp(find_checkpoint(source), small_disk / "out")
    assert names(small_disk) == ["ballast"]


# --- refusals


@pytest.mark.parametrize("form", [[], ["--ranks", "2"], ["--to", "dcp"]])
@pytest.mark.parametrize("taken", ["file", "folder", "checkpoint", "dangling link"])
def test_nothing_is_overwritten(tmp_path, form, taken, capsys):
    source = save_layout(tmp_path, 1, ONE, STATE)
    out = tmp_path / "out"
    if taken == "file":
        out.write_text("mine")
    elif taken == "folder":
        out.mkdir()
    elif taken == "checkpoint":
        out = source
    else:
        out.symlink_to(tmp_path / "absent")
    before = names(tmp_path)
    assert command.main(["convert", str(source), str(out), *form]) == 1
    assert capsys.readouterr().err == (
        f"glam convert: {out}: exists and is not replaced; choose another name or move it away\n"
    )
    assert names(tmp_path) == before


def test_a_full_disk(tmp_path, small_disk):
    source = save_layout(tmp_path, 1, FOUR, STATE)
    (small_disk / "ballast").write_bytes(bytes(1_000_000))
    with pytest.raises(
        CheckpointError, match=r"out: the checkpoint could not be converted: .*No space left.*make room in"
    ):
        convert_checkpoint(find_checkpoint(source), small_disk / "out", 2)
    assert names(small_disk) == ["ballast"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    source = find_checkpoint(save_layout(tmp_path, 1, FOUR, STATE))

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_tensor_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out")
    assert names(tmp_path) == ["step-000001"]


def test_a_killed_conversion_is_cleared_up_by_the_next(tmp_path):
    source = find_checkpoint(save_layout(tmp_path, 1, FOUR, STATE))
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "config.json").write_text("{")
    assert_holds_the_state(convert_checkpoint(source, tmp_path / "out"))
    assert names(tmp_path) == ["out", "step-000001"]


def test_a_damaged_or_incomplete_source_is_refused(tmp_path, capsys):
    source = save_layout(tmp_path, 1, FOUR, STATE)
    flip_bit(source / "model-00002-of-00004.safetensors", -1)
    assert command.main(["convert", str(source), str(tmp_path / "out")]) == 1
    assert "model-00002-of-00004.safetensors: damaged: its SHA-256" in capsys.readouterr().err
    (source / "model-00002-of-00004.safetensors").unlink()
    rewrite_manifest(source)
    for form in ([], ["--to", "dcp"]):
        assert command.main(["convert", str(source), str(tmp_path / "out"), *form]) == 1
        assert "elements are lost" in capsys.readouterr().err
    assert names(tmp_path) == ["step-000001"]


def test_a_number_of_ranks_below_one_is_refused(tmp_path, capsys):
    source = save_layout(tmp_path, 1, ONE, STATE)
    with pytest.raises(ValueError, match="expected num_ranks to be at least 1, got 0"):
        convert_checkpoint(find_checkpoint(source), tmp_path / "out", 0)
    with pytest.raises(SystemExit):
        command.main(["convert", str(source), str(tmp_path / "out"), "--ranks", "0"])
    assert "expected --ranks to be at least 1" in capsys.readouterr().err
