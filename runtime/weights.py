"""Memory-maps an artifact's weights and hands them to the device, to a host's without a copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.artifact import Manifest, WeightTensor
from llmc.errors import ArtifactError


def load_weights(
    directory: Path, manifest: Manifest, tensor: Callable[[npt.NDArray[Any]], Any]
) -> list[Any]:
    """The weights in argument order, each made a tensor of the device's by `tensor`.

    Raises ArtifactError where file and manifest disagree.
    """
    files = {
        name: _Mapped(directory / name) for name in dict.fromkeys(w.file for w in manifest.weights)
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


class _Mapped:
    """One safetensors file; mode "c" (private) because DLPack refuses read-only memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > path.stat().st_size - 8:
                    raise ArtifactError(f"{path}: header of {size} bytes exceeds the file")
                self.header = json.loads(file.read(size))
            self.data = np.memmap(path, np.uint8, "c", offset=8 + size)
        except (OSError, ValueError) as exc:
            raise ArtifactError(f"{path}: not readable as weights: {exc}") from exc

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
