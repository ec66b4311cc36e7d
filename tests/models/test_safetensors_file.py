"""Damaged safetensors files must be refused by a message, whatever was damaged."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llmc.errors import ImportModelError, UnsupportedError
from llmc.models.safetensors_file import open_safetensors


def write(path: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def test_tensors_equal_what_the_library_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    written = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=(2, 2, 2)).astype(np.float16),
        "c": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3, np.int64),
    }
    save_file(written, tmp_path / "w.safetensors")

    found = open_safetensors(tmp_path / "w.safetensors")

    assert set(found) == set(written)
    for name, values in written.items():
        assert found[name].read().dtype == values.dtype
        np.testing.assert_array_equal(found[name].read(), values)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32)}, tmp_path / "w.safetensors")
    raw = (tmp_path / "w.safetensors").read_bytes()
    for length in range(len(raw)):
        (tmp_path / "cut.safetensors").write_bytes(raw[:length])
        with pytest.raises(ImportModelError, match=r"cut\.safetensors"):
            open_safetensors(tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"w": 1, "w": 2}', "twice"),
        ([1], "expected an object"),
        ({"w": 1}, "expected an object"),
        (entry(dtype=4), "dtype 4"),
        (entry(shape=[-4]), "shape"),
        (entry(shape=[True]), "shape"),
        (entry(shape="4"), "shape"),
        (entry(shape=[2**62, 2**62]), "16 bytes"),
        (entry(offsets=[0, 2**63]), "beyond the end"),
        (entry(offsets=[16, 0]), "data_offsets"),
        (entry(offsets=[0]), "data_offsets"),
        (entry(shape=[3]), "needs 12"),
    ],
)
def test_a_wrong_header_is_named(header: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match=message):
        open_safetensors(write(tmp_path / "w.safetensors", header))


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ImportModelError, match=str(2**60)):
        open_safetensors(path)


def test_a_type_that_cannot_be_read_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "w.safetensors", entry("F8_E4M3", [16], [0, 16]))
    tensor = open_safetensors(path)["w"]
    with pytest.raises(UnsupportedError, match="F8_E4M3"):
        tensor.read()
