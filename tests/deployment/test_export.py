"""The TorchScript archive: the same bits as the eager model, whole on disk, and refused when it is not what it says."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from glam_ext.checkpoint import CheckpointError
from glam_ext.config import GLaMConfig
from glam_ext.data import Tokenizer
from glam_ext.export import export_torchscript, load_archive
from glam_ext.generate import generate
from glam_ext.model import GLaM
from tests.deployment.conftest import CONFIG, Deployed, sharp_model

METHODS = ["init_cache", "step", "generate"]
LENGTHS = torch.tensor([5, 12, 9], dtype=torch.int32)


def tokens(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(4, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(module: Any, model: GLaM) -> None:
    """Every method of a module against the eager model, bit for bit; twice, since TorchScript optimises on the way."""
    segments = torch.ones(3, 12, dtype=torch.int32)
    segments[0, 5:] = 2
    segments[1, 8:] = 0
    logits, segmented = model(tokens()), model(tokens(), segments)
    prompts = [row[:length].tolist() for row, length in zip(tokens(), LENGTHS.tolist(), strict=True)]
    new = generate(model, prompts, 10, temperature=0.9, top_k=100, top_p=0.9, seed=3)
    for _ in range(3):
        assert torch.equal(module(tokens()), logits)
        assert torch.equal(module(tokens(), segments), segmented)
        cache = module.init_cache(3, 12)
        for begin, end in ((0, 6), (6, 7), (7, 12)):
            start = torch.full((3,), begin, dtype=torch.int32)
            step, cache = module.step(tokens()[:, begin:end].contiguous(), cache, start)
            assert torch.equal(step, logits[:, end - 1])
        out, counts = module.generate(tokens(), LENGTHS, 10, 0.9, 100, 0.9, 3, [1])
        assert [row[:count] for row, count in zip(out.tolist(), counts.tolist(), strict=True)] == new


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compute_dtype": "float32", "expert_activation": "geglu", "moe_first": False},
        {"num_experts": 0, "tie_embedding": False, "logit_cap": 20.0, "attention_logit_cap": 30.0},
        {"eval_capacity_factor": 1.0, "router_logit_cap": 5.0, "attention_extra_logit": False},
    ],
)
def test_archive_is_the_eager_model(changes: dict[str, Any], tmp_path: Path) -> None:
    model = sharp_model(dataclasses.replace(CONFIG, **changes))
    archive = load_archive(export_torchscript(model, tmp_path / "model.pt"))
    assert archive.config == model.config
    assert archive.tokenizer is None
    if "eval_capacity_factor" in changes:  # generation routes each step on its own: its groups are not the forward's
        assert torch.equal(archive.module(tokens()), model(tokens()))
    else:
        assert_same(archive.module, model)
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(tokens()), model(tokens()))


def test_frozen_and_optimized_archives_give_the_same_bits(deployed: Deployed) -> None:
    frozen = torch.jit.freeze(torch.jit.load(deployed.archive), preserved_attrs=METHODS)
    assert_same(frozen, deployed.model)
    optimized = torch.jit.optimize_for_inference(torch.jit.load(deployed.archive), other_methods=METHODS)
    assert_same(optimized, deployed.model)


def test_generate_of_an_archive_refuses_impossible_lengths(deployed: Deployed) -> None:
    module = load_archive(deployed.archive).module
    for wrong in ([5, 0, 9], [5, 13, 9]):
        with pytest.raises(torch.jit.Error, match=r"glam::generate: expected lengths in \[1, N\]"):
            module.generate(tokens(), torch.tensor(wrong, dtype=torch.int32), 3)


def test_extra_files_carry_configuration_and_tokenizer(deployed: Deployed) -> None:
    archive = load_archive(deployed.archive)
    assert archive.config == deployed.model.config
    assert archive.tokenizer is not None
    assert archive.tokenizer.model == deployed.tokenizer_file.read_bytes()
    assert archive.tokenizer.hash == deployed.tokenizer.hash

    extra: dict[str, Any] = dict.fromkeys(("config.json", "glam.json", "tokenizer.model", "tokenizer.json"), "")
    torch.jit.load(deployed.archive, _extra_files=extra)
    assert GLaMConfig.from_json(extra["config.json"].decode()) == deployed.model.config
    assert json.loads(extra["glam.json"])["format"] == 1
    assert extra["tokenizer.model"] == deployed.tokenizer.model
    assert json.loads(extra["tokenizer.json"])["hash"] == deployed.tokenizer.hash


def test_the_same_model_gives_the_same_bytes(deployed: Deployed, tmp_path: Path) -> None:
    again = export_torchscript(deployed.model, tmp_path / "other name.pt", deployed.tokenizer)
    assert again.read_bytes() == deployed.archive.read_bytes()
    assert os.listdir(tmp_path) == ["other name.pt"]


def test_export_takes_the_parameters_of_the_moment(tmp_path: Path) -> None:
    model = GLaM(CONFIG).train()
    file = export_torchscript(model, tmp_path / "model.pt")
    before = load_archive(file).module(tokens())
    with torch.no_grad():
        model.get_parameter("final_norm.scale").mul_(2)
    after = load_archive(export_torchscript(model, file)).module(tokens())
    assert model.training
    assert torch.equal(after, model.eval()(tokens()))
    assert not torch.equal(after, before)


def test_a_tokenizer_with_more_tokens_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = GLaM(dataclasses.replace(CONFIG, vocab_size=300))
    with pytest.raises(ValueError, match=r"expected a tokenizer of at most the model's 300 tokens, got 512"):
        export_torchscript(model, tmp_path / "model.pt", tokenizer)
    assert not os.listdir(tmp_path)


# --- writing


def test_a_path_that_cannot_be_written_is_named(model: GLaM, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/model.pt.*No such file or directory; check that the path"):
        export_torchscript(model, tmp_path / "nowhere" / "model.pt")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/model.pt.*Not a directory"):
        export_torchscript(model, tmp_path / "file" / "model.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"folder: rename failed: Is a directory"):
        export_torchscript(model, tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_full_disk_leaves_the_old_archive(model: GLaM, small_disk: Path) -> None:
    file = small_disk / "model.pt"
    file.write_bytes(b"the old archive" * 10_000)
    with pytest.raises(CheckpointError, match=r"model.pt: write failed: No space left on device; free some space"):
        export_torchscript(model, file)
    assert os.listdir(small_disk) == ["model.pt"]
    assert file.read_bytes() == b"the old archive" * 10_000


# --- reading what is not right


def refused(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_archive(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message.strip()
    return message


def test_what_is_not_an_archive_is_refused(tmp_path: Path) -> None:
    assert "found no file; write one with `glam export`" in refused(tmp_path / "none.pt")
    assert "found no file" in refused(tmp_path)
    for content in (b"", b"text", bytes(1000), b"PK\x05\x06" + bytes(18)):
        (tmp_path / "x.pt").write_bytes(content)
        assert "export it again with `glam export`" in refused(tmp_path / "x.pt")


def test_an_archive_of_another_program_is_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "linear.pt")
    assert "expected an archive of glam_ext, got another one" in refused(tmp_path / "linear.pt")


def rewritten(source: Path, target: Path, changes: dict[str, bytes]) -> Path:
    """The archive with some records replaced, and checksums that are right again."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            record = info.filename.split("/", 1)[1]
            new.writestr(info.filename, changes.pop(record, old.read(info)))
    assert not changes
    return target


def test_an_archive_of_a_newer_format_is_refused_before_its_code_is_read(deployed: Deployed, tmp_path: Path) -> None:
    assert_same(load_archive(rewritten(deployed.archive, tmp_path / "same.pt", {})).module, deployed.model)
    facts = json.dumps({"format": 2, "glam_ext": "7.1.0"}).encode()
    changes = {"extra/glam.json": facts, "code/__torch__/glam.py": b"class GLaM: torch.ops.glam.of_the_future()"}
    message = refused(rewritten(deployed.archive, tmp_path / "newer.pt", changes))
    assert message.endswith(
        "expected archive format 1 or older, got 2; use glam_ext 7.1.0 or export it again with this one"
    )
    for damaged in (b"", b"[]", b'{"format": "one"}'):
        file = rewritten(deployed.archive, tmp_path / "odd.pt", {"extra/glam.json": damaged})
        assert "expected an archive of glam_ext, got another one" in refused(file)


def test_code_that_does_not_compile_is_refused(deployed: Deployed, tmp_path: Path) -> None:
    file = rewritten(deployed.archive, tmp_path / "x.pt", {"code/__torch__/glam.py": b"class GLaM: what"})
    with pytest.raises(CheckpointError, match=r"x.pt: expected an archive that this version of glam_ext and torch can"):
        load_archive(file)


def test_a_cut_archive_is_refused(deployed: Deployed, tmp_path: Path) -> None:
    content = deployed.archive.read_bytes()
    for size in (0, 1, 21, 22, 1000, len(content) // 2, len(content) - 200, len(content) - 1):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        refused(tmp_path / "cut.pt")


def data_offset(content: bytes, record: zipfile.ZipInfo) -> int:
    """Where a record's own bytes begin: behind its local header, name and padding."""
    name, padding = struct.unpack_from("<HH", content, record.header_offset + 26)
    return record.header_offset + 30 + name + padding


def test_a_flipped_bit_is_refused_or_harmless(deployed: Deployed, tmp_path: Path) -> None:
    """torch.jit.load itself takes flipped weights; here only bits that mean nothing (padding, dates) may pass."""
    content = deployed.archive.read_bytes()
    with zipfile.ZipFile(deployed.archive) as archive:
        records = archive.infolist()
        directory = archive.start_dir
    weights = [data_offset(content, info) + 5 for info in records if "/data/" in info.filename]
    positions = [*weights, *range(directory, len(content), 37)]
    positions += random.Random(0).sample(range(len(content)), 100)
    expected = deployed.model(tokens())
    passed = []
    file = tmp_path / "flipped.pt"
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        file.write_bytes(changed)
        try:
            archive_read = load_archive(file)
        except CheckpointError:
            continue
        passed.append(position)
        assert torch.equal(archive_read.module(tokens()), expected)
        assert archive_read.config == deployed.model.config
    assert not set(passed) & set(weights)
    assert len(passed) < len(positions) // 2


def test_a_weight_flipped_under_torch_itself_goes_unseen(deployed: Deployed, tmp_path: Path) -> None:
    """Why load_archive compares checksums. If this fails, torch does it too, and ours can go."""
    with zipfile.ZipFile(deployed.archive) as archive:
        (first,) = (info for info in archive.infolist() if info.filename.endswith("/data/0"))
    changed = bytearray(deployed.archive.read_bytes())
    changed[data_offset(bytes(changed), first) + 4003] ^= 64
    (tmp_path / "flipped.pt").write_bytes(changed)
    assert not torch.equal(torch.jit.load(tmp_path / "flipped.pt").embedding.weight, deployed.model.embedding.weight)
    assert "data/0 does not have its checksum" in refused(tmp_path / "flipped.pt")


def test_loading_leaves_the_file_alone(deployed: Deployed, tmp_path: Path) -> None:
    file = Path(shutil.copy(deployed.archive, tmp_path / "model.pt"))
    module = load_archive(file).module
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert file.read_bytes() == deployed.archive.read_bytes()
