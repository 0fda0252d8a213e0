"""What a file says about its parts, damaged or hostile: both languages refuse it alike, and `glam verify` names it."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glam_ext import _C
from glam_ext.checkpoint import CheckpointError, save_checkpoint, verify
from glam_ext.checkpoint.tensor_file import DTYPE_NAMES, Record, write_tensor_file
from glam_ext.config import GLaMConfig
from tests.checkpoint.helpers import flip_bit, load_in_cpp, load_in_python, rewrite_manifest
from tests.checkpoint.layouts import CONFIG, FOUR, ONE, TWO, UNEVEN_THREE, save_layout, whole_state

pytestmark = pytest.mark.filterwarnings("error")

WI = "layers.0.moe.wi"
TENSORS = {"x": torch.arange(8.0).reshape(2, 4), "s": torch.tensor(1.0)}


def folder_of(tmp_path, *metadata):
    """A checkpoint of one file for each text, each with the tensors x [2, 4] and, in the first, s []."""
    folder = save_checkpoint(tmp_path, 1, CONFIG, {}, {}, {}, 0)
    (folder / "model.safetensors").unlink()
    for index, text in enumerate(metadata):
        tensors = TENSORS if index == 0 else {"x": TENSORS["x"]}
        save_file(tensors, folder / f"model-{index}.safetensors", {"glam.pieces": text})
    rewrite_manifest(folder)
    return folder


def place(shape: object, offset: object, name: str = "x") -> str:
    return json.dumps({name: {"shape": shape, "offset": offset}})


def assert_both_refuse(folder, message):
    texts = []
    for read in (load_in_python, load_in_cpp):
        with pytest.raises(CheckpointError, match=message) as error:
            read(folder)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    assert str(folder) in texts[0]
    assert "use another checkpoint" in texts[0]


LARGE = 2**63 - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its glam.pieces does not begin with {"),
        ("[]", "does not begin with {"),
        (" {}", "does not begin with {"),
        ("\ufeff{}", "does not begin with {"),
        ("{", "cannot be read, not JSON"),
        ("{} {}", "cannot be read, not JSON"),
        ("{" * 100_000, "cannot be read, not JSON"),
        ('{"x": {"shape": [2, 4], "offset": [0, 0]}, "x": {}}', 'key "x" is given twice'),
        ('{"x": {"shape": [2, 4], "offset": [0, 0], "offset": [0, 0]}}', 'key "offset" is given twice'),
        ('{"x": {"shape": [2, NaN], "offset": [0, 0]}}', "not JSON"),
        (place([2, 4], [0, 0], "y"), 'names "y", which the file does not have'),
        ('{"x": [2, 4]}', "has no shape and offset of x"),
        ('{"x": {"shape": [2, 4]}}', "has no shape and offset of x"),
        ('{"x": {"shape": [2, 4], "offset": [0, 0], "more": 1}}', "has no shape and offset of x"),
        ('{"x": {"shape": [2, 4], "start": [0, 0]}}', "has no list of sizes as the offset of x"),
        (place([2, 4], "00"), "has no list of sizes as the offset of x"),
        (place([2, 4], [0, -1]), "has no list of sizes as the offset of x"),
        (place([2, 4], [0, 1.0]), "has no list of sizes as the offset of x"),
        (place([2, 4], [0, True]), "has no list of sizes as the offset of x"),
        (place([2, 4], [0, None]), "has no list of sizes as the offset of x"),
        (place([2, 2**63], [0, 0]), "has no list of sizes as the shape of x"),
        (place([2, 2**64], [0, 0]), "has no list of sizes as the shape of x"),
        (place([2, 4], [0]), r"gives x a part \[2, 4\] at \[0\] that is not inside \[2, 4\]"),
        (place([2, 4, 1], [0, 0, 0]), "that is not inside"),
        (place([], []), "that is not inside"),
        (place([4], [0], "s"), r"gives s a part \[\] at \[0\] that is not inside \[4\]"),
        (place([1, 4], [0, 0]), "that is not inside"),
        (place([4, 4], [3, 0]), "that is not inside"),
        (place([4, 4], [LARGE, 0]), "that is not inside"),
        (place([LARGE, 4], [0, 0]), "the impossible shape"),
        (place([2**31, 2**31], [0, 0]), "the impossible shape"),
        (place([2**40, 4], [2**39, 0]), r"4398046511096 of 4398046511104 elements are lost"),
        (place([0, LARGE], [0, 0]), "the impossible shape"),
        (place([4, 4], [0, 0]), r"tensor x \[4, 4\]: 8 of 16 elements are lost; there are \[0:2, 0:4\] in model-0"),
        (place([4, 4], [1, 0]), r"8 of 16 elements are lost; there are \[1:3, 0:4\]"),
    ],
)  # fmt: skip
def test_impossible_places_are_refused_alike(tmp_path, text, message):
    assert_both_refuse(folder_of(tmp_path, text), message)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("{}", "{}"), r"tensor x: the part \[0:2, 0:4\] in model-0.safetensors overlaps \[0:2, 0:4\] in model-1"),
        ((place([4, 4], [0, 0]), place([4, 4], [0, 0])), "overlaps"),
        ((place([4, 4], [0, 0]), place([4, 4], [1, 0])), r"\[0:2, 0:4\] in .* overlaps \[1:3, 0:4\] in"),
        ((place([4, 4], [2, 0]), place([4, 4], [1, 0])), r"\[1:3, 0:4\] in .* overlaps \[2:4, 0:4\] in"),
        ((place([2, 8], [0, 0]), place([2, 8], [0, 3])), "overlaps"),
        ((place([4, 8], [0, 0]), place([4, 8], [2, 4])), "16 of 32 elements are lost"),
        ((place([6, 4], [0, 0]), place([6, 4], [4, 0])), "8 of 24 elements are lost"),
        ((place([4, 4], [0, 0]), place([2, 8], [0, 4])), r"tensor x is F32 \[4, 4\] in .* and F32 \[2, 8\] in"),
        ((place([4, 4], [0, 0]), place([4, 4], [1, 0]), place([4, 4], [2, 0])), "overlaps"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_alike(tmp_path, texts, message):
    assert_both_refuse(folder_of(tmp_path, *texts), message)


def test_parts_in_any_order_and_direction_are_put_together(tmp_path, read):
    x = TENSORS["x"]
    content, _ = read(folder_of(tmp_path / "rows", place([4, 4], [2, 0]), place([4, 4], [0, 0])))
    assert torch.equal(content["model"]["x"], torch.cat([x, x]))
    assert torch.equal(content["model"]["s"], TENSORS["s"])
    content, _ = read(folder_of(tmp_path / "columns", place([2, 8], [0, 4]), place([2, 8], [0, 0])))
    assert torch.equal(content["model"]["x"], torch.cat([x, x], dim=1))
    quarters = [place([4, 8], [row, column]) for row in (2, 0) for column in (0, 4)]
    content, _ = read(folder_of(tmp_path / "quarters", *quarters))
    assert torch.equal(content["model"]["x"], torch.cat([torch.cat([x, x]), torch.cat([x, x])], dim=1))


def test_random_boxes_are_judged_as_by_counting(tmp_path):
    """The check looks at boxes only; here it is held against a count of every element."""
    generator = random.Random(0)
    verdicts = {"": 0, "overlaps": 0, "are lost": 0}
    for _ in range(3000):
        shape = [generator.randint(1, 4) for _ in range(generator.randint(0, 3))]
        boxes = [([0] * len(shape), list(shape))]
        for _ in range(generator.randint(0, 5) if shape else 0):  # cut one in two
            offset, sizes = boxes.pop(generator.randrange(len(boxes)))
            dim = generator.randrange(len(shape))
            if sizes[dim] > 1:
                at = generator.randint(1, sizes[dim] - 1)
                boxes.append((list(offset), [at if d == dim else n for d, n in enumerate(sizes)]))
                offset, sizes = list(offset), list(sizes)
                offset[dim] += at
                sizes[dim] -= at
            boxes.append((offset, sizes))
        change = generator.randrange(3)
        if change == 1:
            boxes.pop(generator.randrange(len(boxes)))
        elif change == 2 and len(boxes) > 1:
            boxes[0] = boxes[1]
        if not boxes:
            continue
        generator.shuffle(boxes)
        count = torch.zeros(shape, dtype=torch.int64)
        for offset, sizes in boxes:
            count[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] += 1
        expected = "overlaps" if (count > 1).any() else "are lost" if (count == 0).any() else ""
        problem = _C.problem_of_pieces("x", [(f"file {i}", "F32", shape, *box) for i, box in enumerate(boxes)])
        assert expected in problem, (shape, boxes, problem)
        assert bool(expected) == bool(problem)
        verdicts[expected] += 1
    assert min(verdicts.values()) > 100


def test_facts_that_no_file_could_give():
    """The same check, asked by a save: its numbers come from a caller."""
    problem_of = _C.problem_of_pieces
    assert problem_of("x", []) == "tensor x is missing"
    assert "not inside" in problem_of("x", [("a", "F32", [4], [-1], [2])])
    assert "not inside" in problem_of("x", [("a", "F32", [4], [0, 0], [4])])
    assert "impossible shape" in problem_of("x", [("a", "F32", [-4], [0], [0])])
    assert "has no elements" in problem_of("x", [("a", "F32", [4], [0], [4]), ("b", "F32", [4], [2], [0])])
    assert problem_of("x", [("a", "F32", [0, 3], [0, 0], [0, 3])]) == ""
    assert "overlaps" in problem_of("x", [("a", "F32", [0, 3], [0, 0], [0, 3])] * 2)


def test_flipped_bits_of_a_header_never_crash_or_change_a_size(tmp_path, read):
    """Here nothing may be read or written out of bounds; a flip in a name is for the manifest's hash to find."""
    folder = save_layout(tmp_path, 1, FOUR, whole_state())
    path = folder / "model-00002-of-00004.safetensors"
    whole = path.read_bytes()
    num_bits = 8 * (8 + int.from_bytes(whole[:8], "little"))
    size = sum(tensor.nbytes for tensor in whole_state()[0].values())
    refused = 0
    for bit in range(0, num_bits, 37):
        flip_bit(path, bit // 8, bit % 8)
        try:
            content, _ = read(folder, hashes=False)
        except CheckpointError:
            refused += 1
        else:
            assert sum(tensor.nbytes for tensor in content["model"].values()) == size
        path.write_bytes(whole)
    assert refused > 0.7 * num_bits / 37


# --- the writer


def test_the_writer_writes_the_bytes_of_the_reference(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{i} \u00e9": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype, name in DTYPE_NAMES.items()
        for i, shape in enumerate([(), (3,), (0, 2), (2, 3, 5)])
    }
    records = {name: Record(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    write_tensor_file(tmp_path / "mine", records, {"format": "pt"})
    save_file(tensors, tmp_path / "reference", {"format": "pt"})
    assert (tmp_path / "mine").read_bytes() == (tmp_path / "reference").read_bytes()
    assert load_file(tmp_path / "mine").keys() == tensors.keys()


def test_the_writer_asks_for_one_tensor_at_a_time(tmp_path):
    alive = []

    def read(value):
        assert all(reference() is None for reference in alive)
        tensor = torch.full((1000,), float(value))
        alive.append(weakref.ref(tensor))
        return tensor

    records = {str(i): Record(torch.float32, (1000,), lambda i=i: read(i)) for i in range(5)}
    write_tensor_file(tmp_path / "a", records, {})
    assert len(alive) == 5
    assert all((tensor == int(name)).all() for name, tensor in load_file(tmp_path / "a").items())


# --- glam verify


def examine(folder, capsys, *options):
    status = verify.main([str(folder), *options])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("layout", [ONE, TWO, UNEVEN_THREE, FOUR], ids=str)
def test_verify_finds_a_whole_folder_good(tmp_path, capsys, layout):
    folder = save_layout(tmp_path, 1, layout, whole_state())
    num_files = 2 * math.prod(layout) + 2
    tensors = sum(map(len, whole_state()))
    for options in ((), ("--sizes-only",)):
        status, text = examine(folder, capsys, *options)
        assert status == 0
        assert re.fullmatch(rf"good  {folder}: {num_files} files, {tensors} tensors, [\d,]+ bytes\n", text)


def test_verify_names_every_damaged_file(tmp_path, capsys):
    folder = save_layout(tmp_path, 1, FOUR, whole_state())
    flip_bit(folder / "model-00002-of-00004.safetensors", -1)
    (folder / "optimizer-00003-of-00004.safetensors").unlink()
    status, text = examine(folder, capsys)
    assert status == 1
    assert text.count("BAD   ") == 2
    assert "model-00002-of-00004.safetensors: damaged: its SHA-256" in text
    assert "optimizer-00003-of-00004.safetensors: missing" in text
    status, text = examine(folder, capsys, "--sizes-only")
    assert (status, text.count("BAD   ")) == (1, 1)


@pytest.mark.parametrize("options", [(), ("--sizes-only",)])
def test_verify_names_every_tensor_of_a_lost_shard(tmp_path, capsys, read, options):
    """Every file is whole, one is not there and not listed."""
    folder = save_layout(tmp_path, 1, FOUR, whole_state())
    file = folder / "model-00002-of-00004.safetensors"
    with safe_open(file, "pt") as shard:
        lost = set(shard.keys())
    file.unlink()
    rewrite_manifest(folder)
    status, text = examine(folder, capsys, *options)
    assert status == 1
    parts = [name for name in lost if ".moe.w" in name]
    assert {f"layers.{layer}.moe.{w}" for layer in (0,) for w in ("wi", "wo")} <= set(parts)
    for name in parts:
        assert re.search(rf"BAD   {folder}: tensor {name} \[4, .*\]: \d+ of \d+ elements are lost", text)
    assert text.count("BAD   ") == len(parts)
    with pytest.raises(CheckpointError, match="elements are lost"):
        read(folder)


def test_verify_names_a_part_that_is_there_twice(tmp_path, capsys, read):
    folder = save_layout(tmp_path, 1, FOUR, whole_state())
    shutil.copy(folder / "model-00002-of-00004.safetensors", folder / "model-00005-of-00004.safetensors")
    rewrite_manifest(folder)
    status, text = examine(folder, capsys)
    assert status == 1
    assert re.search(rf"tensor {WI}: the part \[1:2, .*\] in model-0000.* overlaps \[1:2, .*\] in model-0000", text)
    with pytest.raises(CheckpointError, match="overlaps"):
        read(folder)


def test_verify_compares_the_model_with_its_configuration(tmp_path, capsys):
    model, optimizer = whole_state()

    def saved(step, config=CONFIG, **changes):
        tensors = {name: tensor for name, tensor in {**model, **changes}.items() if tensor is not None}
        return save_checkpoint(tmp_path, step, config, tensors, optimizer, {}, 0)

    status, text = examine(saved(1, **{"final_norm.scale": None, WI: None}), capsys)
    assert (status, text.count("BAD   ")) == (1, 2)
    assert f"tensor {WI} of config.json's model is missing" in text
    assert "tensor final_norm.scale of config.json's model is missing" in text
    status, text = examine(saved(2, extra=torch.ones(1)), capsys)
    assert (status, text.count("BAD   ")) == (1, 1)
    assert "tensor extra does not belong to config.json's model" in text
    status, text = examine(saved(3, **{WI: torch.ones(3, 16, 24)}), capsys)
    assert (status, text.count("BAD   ")) == (1, 1)
    assert f"expected tensor {WI} to be [4, 16, 24] by config.json, got [3, 16, 24]" in text
    status, text = examine(saved(4, config=GLaMConfig.preset("tiny")), capsys)
    assert status == 1
    assert verify.main([str(tmp_path)]) == 1
