"""Any layout of ranks loads what any other saved, bit for bit: weights and optimiser state, tensor by tensor."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

from glam_ext.checkpoint import Piece, load_checkpoint, save_checkpoint
from glam_ext.checkpoint import folder as folder_module
from tests.checkpoint.helpers import names
from tests.checkpoint.layouts import (
    CONFIG,
    FOUR,
    LAYOUTS,
    MORE_THAN_EXPERTS,
    ONE,
    REPLICAS,
    TWO,
    TWO_DIMENSIONS,
    UNEVEN_THREE,
    assert_same_state,
    held_by,
    load_layout,
    local,
    part_of,
    save_layout,
    whole_state,
)
from tests.checkpoint.thread_ranks import succeed

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_every_layout_loads_it(tmp_path, saved):
    state = whole_state()
    save_layout(tmp_path, 1, saved, state)
    for loaded in LAYOUTS:
        for rank, got in enumerate(load_layout(tmp_path, loaded)):
            assert_same_state(got, held_by(loaded, rank, state))


def test_a_run_that_changes_its_layout_again_and_again(tmp_path):
    """4 -> 2 -> 1 -> 4 -> an uneven 3: each saves what it loaded."""
    state = whole_state()
    path = save_layout(tmp_path / "0", 0, REPLICAS, state)
    for generation, layout in enumerate([TWO, ONE, FOUR, UNEVEN_THREE, TWO_DIMENSIONS], start=1):
        loaded = load_layout(path, layout)

        def save(ranks, layout=layout, loaded=loaded, generation=generation):
            held = held_by(layout, ranks.rank, state)
            model, optimizer = (
                {
                    name: Piece(mine[name], v.shape, v.offset) if isinstance(v, Piece) else mine[name]
                    for name, v in h.items()
                }
                for h, mine in zip(held, loaded[ranks.rank], strict=True)
            )
            trainer = {"tokens": 7, "optimizer": "adafactor"}
            return save_checkpoint(tmp_path / str(generation), generation, CONFIG, model, optimizer, trainer, 0, ranks)

        path = succeed(math.prod(layout), save)[0]
    got = load_checkpoint(path)
    assert_same_state((got.model, got.optimizer), state)


@pytest.mark.parametrize("saved", LAYOUTS, ids=str)
def test_both_languages_read_it_whole(tmp_path, read, saved):
    state = whole_state()
    save_layout(tmp_path, 1, saved, state)
    content, warned = read(tmp_path)
    assert warned == []
    assert_same_state((content["model"], content["optimizer"]), state)


def test_the_uneven_split_is_uneven():
    boxes = [part_of(UNEVEN_THREE, rank)("layers.0.moe.wi", (4, 16, 24)) for rank in range(3)]
    assert [box[0] for box in boxes] == [slice(0, 2), slice(2, 3), slice(3, 4)]


# --- the files


def test_one_rank_writes_the_files_it_always_wrote(tmp_path):
    folder = save_layout(tmp_path, 1, ONE, whole_state())
    expected = [
        "COMPLETE",
        "config.json",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    assert names(folder) == expected
    for stem in ("model", "optimizer"):
        with safe_open(folder / f"{stem}.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_each_rank_writes_its_files_and_each_element_is_there_once(tmp_path):
    model, optimizer = whole_state()
    folder = save_layout(tmp_path, 1, REPLICAS, (model, optimizer))
    tensor_files = [
        f"{stem}-{rank:05d}-of-00004.safetensors" for stem in ("model", "optimizer") for rank in range(1, 5)
    ]
    assert names(folder) == sorted([*tensor_files, "COMPLETE", "config.json", "manifest.json", "trainer.json"])
    for stem, tensors in (("model", model), ("optimizer", optimizer)):
        seen = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in tensors.items()}
        for rank in range(1, 5):
            with safe_open(folder / f"{stem}-{rank:05d}-of-00004.safetensors", "pt") as file:
                places = json.loads(file.metadata().get("glam.pieces", "{}"))
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    part = file.get_tensor(name)
                    place = places.get(name, {"shape": list(part.shape), "offset": [0] * part.dim()})
                    assert place["shape"] == list(tensors[name].shape)
                    box = tuple(slice(o, o + n) for o, n in zip(place["offset"], part.shape, strict=True))
                    assert torch.equal(part, tensors[name][box])
                    seen[name][box] += 1
        for name, count in seen.items():
            assert (count == 1).all(), name


def test_replicas_are_shared_out_evenly(tmp_path):
    folder = save_layout(tmp_path, 1, REPLICAS, whole_state())
    sizes = [sum(file.stat().st_size for file in folder.glob(f"*-{rank:05d}-of-*")) for rank in range(1, 5)]
    assert max(sizes) < 1.3 * min(sizes)


def test_a_rank_without_a_share_writes_files_without_tensors(tmp_path):
    """More ranks than experts: empty parts are neither written nor lost."""
    held = held_by(MORE_THAN_EXPERTS, 5, whole_state())
    assert local(held[0]["layers.0.moe.wi"]).shape == (0, 16, 24)
    folder = save_layout(tmp_path, 1, MORE_THAN_EXPERTS, whole_state())
    with safe_open(folder / "model-00006-of-00006.safetensors", "pt") as file:
        assert "layers.0.moe.wi" not in file.keys()  # noqa: SIM118


def test_tensors_without_elements_and_scalars(tmp_path, read):
    tensors = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(3), "flag": torch.tensor([True, False])}

    def save(ranks):
        half = Piece(tensors["flag"][ranks.rank : ranks.rank + 1], (2,), (ranks.rank,))
        return save_checkpoint(tmp_path, 1, CONFIG, {**tensors, "flag": half}, {}, {}, 0, ranks)

    succeed(2, save)
    content, _ = read(tmp_path)
    assert_same_state((content["model"], {}), (tensors, {}))


# --- reading parts


def test_only_the_wanted_bytes_are_read(tmp_path):
    """A part of a tensor of 64 GiB, most of which is a hole in the file."""
    rows, columns = 1 << 20, 1 << 14
    header = {"big": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the reader copies what is not aligned
    folder = save_checkpoint(tmp_path, 1, CONFIG, {}, {}, {}, 0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.seek(4 * columns * (rows - 1), 1)
        file.write(torch.arange(columns, dtype=torch.float32).numpy().tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry["size"] = (folder / entry["file"]).stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))

    def part(name, shape):
        assert (name, shape) == ("big", (rows, columns))
        return (slice(rows - 1, None), slice(5, 8))

    loaded = load_checkpoint(folder, hashes=False, part=part).model["big"]
    assert loaded.tolist() == [[5.0, 6.0, 7.0]]
    assert loaded.untyped_storage().nbytes() == 12


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ((slice(0, 5),), r"expected a slice inside dimension 0 of \[4, 16, 24\], got slice\(0, 5, None\)"),
        ((slice(-1, None),), "expected a slice inside dimension 0"),
        ((slice(3, 2),), "expected a slice inside dimension 0"),
        ((slice(None), slice(0, 4, 2)), "expected a slice inside dimension 1"),
        ((slice(None),) * 4, r"expected at most 3 slices of \[4, 16, 24\], got 4"),
    ],
)
def test_a_part_outside_the_tensor_is_refused(tmp_path, slices, message):
    save_layout(tmp_path, 1, TWO, whole_state())
    with pytest.raises(ValueError, match=f"tensor layers.0.moe.wi: {message}"):
        load_checkpoint(tmp_path, part=lambda name, shape: slices if name == "layers.0.moe.wi" else None)


def test_loaded_tensors_can_be_written_to_and_change_no_file(tmp_path):
    folder = save_layout(tmp_path, 1, TWO, whole_state())
    for tensor in load_checkpoint(folder).model.values():
        tensor.zero_()
    state = whole_state()
    got = load_checkpoint(folder)
    assert_same_state((got.model, got.optimizer), state)


def test_the_ranks_share_the_hashing(tmp_path, monkeypatch):
    folder = save_layout(tmp_path, 1, FOUR, whole_state())
    hashed: list[str] = []
    real = folder_module.sha256_of_file
    monkeypatch.setattr(folder_module, "sha256_of_file", lambda file: (hashed.append(file.name), real(file))[1])
    load_layout(folder, FOUR)
    assert sorted(hashed) == [name for name in names(folder) if name not in ("COMPLETE", "manifest.json")]
