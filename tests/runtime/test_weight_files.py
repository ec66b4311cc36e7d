"""Reading weight files: the manifest's arrays come out, and no damaged byte is used."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from fake_model import make_manifest
from safetensors.numpy import save_file

from llmc.artifact import Manifest, WeightTensor, sha256_of
from llmc.errors import ArtifactError
from llmc.runtime import weights as module
from llmc.runtime.weights import WeightFiles

ARRAYS = {
    "a": np.arange(5000, dtype=np.float32).reshape(50, 100),
    "b": np.random.default_rng(3).integers(0, 256, 3000, np.uint8),
    "c": np.arange(-700, 700, dtype=np.int32).reshape(2, 700),
}
FILES = {"weights-00001.safetensors": ["b", "a"], "weights-00002.safetensors": ["c"]}


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Of two files, the first of which is read in several parts."""
    monkeypatch.setattr(module, "_PART_BYTES", 4096)
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


@pytest.mark.parametrize("resident", [True, False])
def test_weights_come_in_argument_order_as_they_were_written(
    tmp_path: Path, manifest: Manifest, resident: bool
) -> None:
    with WeightFiles(tmp_path, manifest, resident=resident) as files:
        arrays = files.tensors(lambda array: array)
    for array, expected in zip(arrays, ARRAYS.values(), strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("place", [0, 9, 4095, 4096, 12000, -1])
def test_a_changed_byte_is_found_wherever_it_is(
    tmp_path: Path, manifest: Manifest, resident: bool, place: int
) -> None:
    path = tmp_path / "weights-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    _expect_damage(tmp_path, manifest, "weights-00001.safetensors: SHA-256", resident=resident)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("size", [0, 7, 4096, 12000, -1])
def test_a_truncated_file_is_damaged(
    tmp_path: Path, manifest: Manifest, resident: bool, size: int
) -> None:
    path = tmp_path / "weights-00001.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    _expect_damage(tmp_path, manifest, "weights-00001.safetensors: ", resident=resident)


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
