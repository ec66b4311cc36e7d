"""Reading weight files: the manifest's arrays come out, and no damaged byte is used."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from fake_model import make_manifest
from safetensors.numpy import save_file

from llmc.artifact import Manifest, WeightTensor, sha256_of
from llmc.errors import ArtifactError
from llmc.runtime import weights as module
from llmc.runtime.weights import WeightFiles, large_page_bytes

ARRAYS = {
    "a": np.arange(2_200_000, dtype=np.float32).reshape(1000, 2200),
    "b": np.random.default_rng(3).integers(0, 256, 3000, np.uint8),
    "c": np.arange(-700, 700, dtype=np.int32).reshape(2, 700),
}
FILES = {"weights-00001.safetensors": ["b", "a"], "weights-00002.safetensors": ["c"]}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of two files, the first of which is larger than four large pages."""
    for file, names in FILES.items():
        save_file({name: ARRAYS[name] for name in names}, tmp_path / file)
    weights = [
        WeightTensor(
            name=name,
            file=next(file for file, names in FILES.items() if name in names),
            dtype=array.dtype.name,
            shape=list(array.shape),
            format="f32",
            layout="plain",
            sources=[name],
            num_bytes=array.nbytes,
        )
        for name, array in ARRAYS.items()
    ]
    files = {file: sha256_of(tmp_path / file) for file in FILES}
    return dataclasses.replace(make_manifest(), weights=weights, files=files)


@pytest.fixture(params=["device", "large pages", "small pages"])
def resident(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tensors are computed with where they lie, in whatever pages the system has them."""
    in_large_pages = sys.maxsize if request.param == "large pages" else 0
    monkeypatch.setattr(module, "large_page_bytes", lambda address: in_large_pages)
    return bool(request.param != "device")


def test_weights_come_in_argument_order_as_they_were_written(
    tmp_path: Path, manifest: Manifest, resident: bool
) -> None:
    with WeightFiles(tmp_path, manifest, resident=resident) as files:
        arrays = files.tensors(lambda array: array)
    for array, expected in zip(arrays, ARRAYS.values(), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("place", [0, 9, 4095, 4096, 5_000_000, -1])
def test_a_changed_byte_is_found_wherever_it_is(
    tmp_path: Path, manifest: Manifest, resident: bool, place: int
) -> None:
    path = tmp_path / "weights-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    _expect_damage(tmp_path, manifest, "weights-00001.safetensors: SHA-256", resident=resident)


@pytest.mark.parametrize("size", [0, 7, 4096, 5_000_000, -1])
def test_a_truncated_file_is_damaged(
    tmp_path: Path, manifest: Manifest, resident: bool, size: int
) -> None:
    path = tmp_path / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    _expect_damage(tmp_path, manifest, "weights-00001.safetensors: ", resident=resident)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("in_large_pages", [0, 0.89, 0.91])
def test_a_file_is_computed_with_where_it_is_mapped_if_that_is_in_large_pages(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, in_large_pages: float
) -> None:
    num_bytes = int(in_large_pages * 4 * 2**21)
    monkeypatch.setattr(module, "large_page_bytes", lambda address: num_bytes)
    with WeightFiles(tmp_path, manifest, resident=True) as files:
        a, _, c = files.tensors(lambda array: array)
    large, small = (tmp_path / file for file in FILES)
    assert _is_mapped(a, large) == (in_large_pages > 0.9)
    assert _is_mapped(c, small)  # less than a page


def _is_mapped(array: npt.NDArray[np.generic], path: Path) -> bool:
    """Whether the array lies in a mapping of the file, not in memory of its own."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, _, end = line.partition(" ")[0].partition("-")
        if int(begin, 16) <= array.ctypes.data < int(end, 16):
            return line.endswith(str(path))
    raise AssertionError("not in memory")


def test_large_pages_are_those_of_the_mapping_at_the_address(tmp_path: Path) -> None:
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "7f0000000000-7f0000400000 r--p 00000000 fe:00 12 /folder/other\n"
        "Size:               4096 kB\nFilePmdMapped:     4096 kB\nVmFlags: rd mr\n"
        "7f0000400000-7f0000a00000 rw-p 00000000 fe:00 13 /folder/weights\n"
        "Size:               6144 kB\nFilePmdMapped:     2048 kB\nVmFlags: rd mr\n"
    )
    assert large_page_bytes(0x7F0000400000, smaps) == 2 * 2**20
    assert large_page_bytes(0x7F0000000000, smaps) == 4 * 2**20
    assert large_page_bytes(0x7F0000800000, smaps) == 0
    assert large_page_bytes(0x7F0000400000, tmp_path / "missing") == 0


def test_a_longer_file_is_damaged_and_a_missing_one_missing(
    tmp_path: Path, manifest: Manifest
) -> None:
    path = tmp_path / "weights-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    _expect_damage(tmp_path, manifest, "weights-00002.safetensors: SHA-256", resident=True)
    path.unlink()
    _expect_damage(tmp_path, manifest, "weights-00002.safetensors: missing", resident=True)


def _expect_damage(folder: Path, manifest: Manifest, words: str, *, resident: bool) -> None:
    with (
        pytest.raises(ArtifactError, match=words) as caught,
        WeightFiles(folder, manifest, resident=resident) as files,
    ):
        files.tensors(lambda array: array)
    assert caught.value.hint
