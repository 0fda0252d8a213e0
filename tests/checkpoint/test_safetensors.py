"""The safetensors file in C++: against the reference implementation both ways, and against damage of every kind."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glam_ext import _C
from glam_ext.checkpoint import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def sample() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{str(dtype).split('.')[1]}.{i}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in DTYPES
        for i, shape in enumerate([(), (1,), (0, 3), (5, 3), (2, 3, 7)])
    }
    tensors["not contiguous"] = torch.randn(4, 6, generator=generator).t()[::2]
    tensors['na"me \u00e9'] = torch.randn(3, generator=generator)
    return tensors


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name], tensor), name


def test_reads_what_the_reference_writes(tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in sample().items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_same(_C.read_safetensors(tmp_path / "a.safetensors"), tensors)


def test_the_reference_reads_what_cpp_writes(tmp_path):
    file = tmp_path / "a.safetensors"
    _C.write_safetensors(file, sample(), {"format": "pt", "made by": "test"})
    assert_same(load_file(file), sample())
    assert_same(_C.read_safetensors(file), sample())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made by": "test"}


def test_no_tensors_at_all(tmp_path):
    _C.write_safetensors(tmp_path / "a.safetensors", {})
    assert load_file(tmp_path / "a.safetensors") == {} == _C.read_safetensors(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "b.safetensors")
    assert _C.read_safetensors(tmp_path / "b.safetensors") == {}


def test_tensors_outlive_the_file_and_never_write_to_it(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(100_000, dtype=torch.float32)}, file)
    before = file.read_bytes()
    x = _C.read_safetensors(file)["x"]
    x.add_(1)
    assert file.read_bytes() == before
    file.unlink()
    assert torch.equal(x, torch.arange(1, 100_001, dtype=torch.float32))


def file_with(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_unaligned_tensors_are_read_correctly(tmp_path):
    file = tmp_path / "a.safetensors"
    values = torch.tensor([1.5, -2.0])
    header = {"byte": entry("U8", [1], 0, 1), "x": entry("F32", [2], 1, 9)}
    file.write_bytes(file_with(header, b"\x07" + values.numpy().tobytes()))
    tensors = _C.read_safetensors(file)
    assert torch.equal(tensors["x"], values)
    assert tensors["x"].data_ptr() % 4 == 0


GOOD = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\x08\0\0\0", "it has 4 bytes"),
        (struct.pack("<Q", 100) + b"{}", "its header claims 100 bytes, the file has 10"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "its header claims 18446744073709551615 bytes"),
        (file_with(b"[]"), "its header does not begin with {"),
        (file_with(b""), "its header does not begin with {"),
        (file_with(b'{"x": '), "its header is damaged, not JSON"),
        (file_with(b'{"x\xff": 1}'), "its header is damaged, not JSON"),
        (
            file_with(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{}}', b"\0"),
            'its header is damaged, key "x" is given twice',
        ),
        (file_with({"x": 1}), "tensor x has no dtype, shape and pair of data_offsets"),
        (file_with({"x": {"dtype": "F32", "shape": [2]}}, bytes(8)), "tensor x has no dtype, shape and pair"),
        (file_with({"x": {**GOOD, "more": 1}}, bytes(8)), "tensor x has no dtype, shape and pair"),
        (file_with({"x": {**GOOD, "data_offsets": [0, 4, 8]}}, bytes(8)), "tensor x has no dtype, shape and pair"),
        (file_with({"x": {**GOOD, "dtype": "F31"}}, bytes(8)), 'tensor x has the dtype "F31"'),
        (file_with({"x": {**GOOD, "shape": [-2]}}, bytes(8)), "tensor x has the size or offset -2"),
        (file_with({"x": {**GOOD, "shape": [2.0]}}, bytes(8)), "tensor x has the size or offset 2.0"),
        (file_with({"x": entry("F32", [2**62, 2**62], 0, 8)}, bytes(8)), "tensor x has the shape"),
        (
            file_with({"x": entry("F32", [3], 0, 8)}, bytes(8)),
            r"F32 \[3\] needs 12 bytes, its data_offsets are",
        ),
        (file_with({"x": entry("F32", [2], 8, 0)}, bytes(8)), r"needs 8 bytes, its data_offsets are \[8,0\]"),
        (file_with({"x": GOOD}, bytes(7)), "its tensors end at byte 8 of the data, which has 7 bytes"),
        (file_with({"x": GOOD}, bytes(9)), "its tensors end at byte 8 of the data, which has 9 bytes"),
        (file_with({"x": GOOD, "y": entry("F32", [2], 4, 12)}, bytes(12)), "tensor y overlaps another or leaves"),
        (file_with({"x": GOOD, "y": GOOD}, bytes(8)), "tensor . overlaps another or leaves a gap"),
        (
            file_with({"x": GOOD, "y": entry("F32", [2], 12, 20)}, bytes(20)),
            "tensor y overlaps another or leaves",
        ),
        (file_with({"x": entry("BOOL", [2], 0, 2)}, b"\x01\x02"), "tensor x is BOOL and has bytes other than 0 and 1"),
        (file_with({"__metadata__": {"a": 1}}), "its __metadata__ is not a map from text to text"),
    ],
)
def test_malformed_files_are_refused(tmp_path, content, message):
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        _C.read_safetensors(file)
    assert str(file) in str(error.value)
    assert "use another checkpoint" in str(error.value)


def test_every_truncation_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.randn(3, 5), "y": torch.ones(4, dtype=torch.bool)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            _C.read_safetensors(file)


def test_flipped_header_bits_never_crash_or_change_a_size(tmp_path):
    """A flip in a name or in padding is for the manifest's hash to find; here nothing may be read out of bounds."""
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.randn(3, 5), "y": torch.ones(4, dtype=torch.int64)}, file)
    whole = bytearray(file.read_bytes())
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    refused = read = 0
    for bit in range(0, 8 * (8 + header_bytes), 3):
        whole[bit // 8] ^= 1 << bit % 8
        file.write_bytes(whole)
        try:
            tensors = _C.read_safetensors(file)
        except CheckpointError:
            refused += 1
        else:
            read += 1
            assert sum(tensor.nbytes for tensor in tensors.values()) == 3 * 5 * 4 + 4 * 8
        whole[bit // 8] ^= 1 << bit % 8
    assert refused > 0.7 * (refused + read)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_named(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    if kind == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match=str(path)):
        _C.read_safetensors(path)


def test_writer_refuses_what_it_cannot_keep(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"tensor x has the dtype ComplexFloat.*convert it first"):
        _C.write_safetensors(file, {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(CheckpointError, match="a tensor cannot be called __metadata__"):
        _C.write_safetensors(file, {"__metadata__": torch.zeros(2)})
    assert not file.exists()
    with pytest.raises(CheckpointError, match="No such file or directory; check that the path exists"):
        _C.write_safetensors(tmp_path / "absent" / "a.safetensors", {})


def test_writer_on_a_full_disk_keeps_the_older_file(small_disk):
    file = small_disk / "a.safetensors"
    _C.write_safetensors(file, {"x": torch.ones(8)})
    with pytest.raises(CheckpointError, match="write failed: No space left on device; free some space or choose"):
        _C.write_safetensors(file, {"x": torch.zeros(1_000_000)})
    assert [path.name for path in small_disk.iterdir()] == ["a.safetensors"]
    assert_same(_C.read_safetensors(file), {"x": torch.ones(8)})


@pytest.mark.parametrize("length", [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 128, 1000, (1 << 20) + 17])
def test_sha256_equals_the_standard_librarys(tmp_path, length):
    data = bytes(i * 7 % 251 for i in range(length))
    assert _C.sha256(data) == hashlib.sha256(data).hexdigest()
    (tmp_path / "a").write_bytes(data)
    assert _C.sha256_of_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
