"""Reads an artifact's weights and hands them to the device, to a host's without a copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.artifact import Manifest, WeightTensor
from llmc.errors import ArtifactError

_ALIGNMENT = 4096  # of a file in memory: its tensors are then aligned as they are in it


def load_weights(
    directory: Path,
    manifest: Manifest,
    tensor: Callable[[npt.NDArray[Any]], Any],
    *,
    resident: bool,
) -> list[Any]:
    """The weights in argument order, each made a tensor of the device's by `tensor`.

    With `resident` that tensor is the array itself: files are read rather than mapped, into pages
    of 2 MiB where the system has them, from which a processor reads a quarter faster. Raises
    ArtifactError where file and manifest disagree.
    """
    files = {
        name: _File(directory / name, resident)
        for name in dict.fromkeys(w.file for w in manifest.weights)
    }
    # Large tensors lie aligned in the file and are not copied; small odd-sized ones may be.
    return [tensor(files[w.file].view(w)) for w in manifest.weights]


def random_tensors(manifest: Manifest, tensor: Callable[[npt.NDArray[Any]], Any]) -> list[Any]:
    """Tensors of the weights' shapes and types, floats small, integers of any bits: for speed."""
    generator = np.random.default_rng(0)
    return [tensor(_random(weight, generator)) for weight in manifest.weights]


def _random(weight: WeightTensor, generator: np.random.Generator) -> npt.NDArray[Any]:
    dtype = np.dtype(weight.dtype)
    if dtype.kind in "iu" and weight.format not in ("bf16", "f16"):
        data = generator.integers(0, 256, weight.num_bytes, np.uint8)
        if weight.format == "fp8":
            data &= np.uint8(0xF7)  # no code is NaN
        return data.view(dtype).reshape(weight.shape)
    # Large matrices repeat: drawing billions of numbers would take minutes.
    count = weight.num_bytes // dtype.itemsize
    values = generator.standard_normal(min(count, 1 << 20), np.float32) * np.float32(0.02)
    if dtype.kind in "iu":  # the bits of 16-bit floats
        upper = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (upper if weight.format == "bf16" else values.astype(np.float16)).view(dtype)
    return np.resize(values.astype(dtype), weight.shape)


class _File:
    """One safetensors file."""

    def __init__(self, path: Path, resident: bool) -> None:
        self.path = path
        try:
            data = _read(path) if resident else np.memmap(path, np.uint8, "r")
            size = int.from_bytes(data[:8].tobytes(), "little")
            if size > data.nbytes - 8:
                raise ArtifactError(f"{path}: header of {size} bytes exceeds the file")
            self.header = json.loads(data[8 : 8 + size].tobytes())
        except (OSError, ValueError) as exc:
            raise ArtifactError(f"{path}: not readable as weights: {exc}") from exc
        self.data = data[8 + size :]

    def view(self, weight: WeightTensor) -> npt.NDArray[np.generic]:
        """The bytes of one tensor as the array the manifest describes."""
        entry = self.header.get(weight.name)
        if entry is None or list(entry["shape"]) != weight.shape:
            raise ArtifactError(f"{self.path}: no tensor {weight.name} of shape {weight.shape}")
        begin, end = entry["data_offsets"]
        raw = self.data[begin:end]
        if raw.nbytes != weight.num_bytes:
            raise ArtifactError(
                f"{self.path}: {weight.name} has {raw.nbytes} bytes, expected {weight.num_bytes}"
            )
        return raw.view(weight.dtype).reshape(weight.shape)


def _read(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes; NumPy asks for large pages for arrays of their size."""
    size = path.stat().st_size
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    data = memory[begin : begin + size]
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < size:
            count = file.readinto(data[done:].data)
            if not count:
                raise OSError(f"ends after {done} of {size} bytes")
            done += count
    return data
