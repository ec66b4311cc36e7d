"""Reads an artifact's weights and hands them to the device, to a host's without a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from llmc.artifact import Manifest, WeightTensor
from llmc.cpu_features import num_cores
from llmc.errors import ArtifactError

_ALIGNMENT = 4096  # of a file in memory: its tensors are then aligned as they are in it
# That are read, then hashed, at a time: between them a thread waits for Python's lock, which
# parsing a tokenizer holds for a tenth of a second.
_PART_BYTES = 256 * 2**20

MakeTensor: TypeAlias = Callable[[npt.NDArray[Any]], Any]


class WeightFiles:
    """An artifact's weight files, which other threads read and hash while the caller goes on.

    A context manager: the threads end with it.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, resident: bool) -> None:
        """Begins. With `resident` tensors lie in memory of the process: files are read rather than
        mapped, into pages of 2 MiB where the system has them, from which a processor reads a
        quarter faster. ArtifactError where a file is missing.
        """
        self._manifest = manifest
        self._resident = resident
        names = dict.fromkeys(w.file for w in manifest.weights)
        paths = {name: manifest.path_of(directory, name) for name in names}
        workers = num_cores()
        self._readers = ThreadPoolExecutor(workers)
        self._hashers = ThreadPoolExecutor(workers)
        self._files = {
            name: self._hashers.submit(self._open, name, path) for name, path in paths.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hashers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def tensors(self, tensor: MakeTensor) -> list[Any]:
        """The weights in argument order, each made a tensor of the device's by `tensor`.

        With `resident` that tensor is the array itself. Waits for the files; raises ArtifactError
        where one is damaged or disagrees with the manifest.
        """
        files = {name: file.result() for name, file in self._files.items()}
        # Large tensors lie aligned in the file and are not copied; small odd-sized ones may be.
        return [tensor(files[w.file].view(w)) for w in self._manifest.weights]

    def _open(self, name: str, path: Path) -> _File:
        try:
            if self._resident:
                data = _aligned(path.stat().st_size)
            else:
                data = np.memmap(path, np.uint8, "r")
            ranges = [data[i : i + _PART_BYTES] for i in range(0, data.nbytes, _PART_BYTES)]
            reads = [
                self._readers.submit(_read, path, i * _PART_BYTES, part)
                for i, part in enumerate(ranges)
                if self._resident
            ]
            digest = hashlib.sha256()
            for part, read in zip_longest(ranges, reads):
                if read is not None:
                    read.result()
                digest.update(part.data)
        except (OSError, ValueError) as exc:
            raise ArtifactError(
                f"{path}: not readable as weights: {exc}",
                hint="the file is damaged: copy or compile the artifact again",
            ) from exc
        self._manifest.check_digest(path, name, digest.hexdigest())
        return _File(path, data)


def random_tensors(manifest: Manifest, tensor: MakeTensor) -> list[Any]:
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

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path = path
        size = int.from_bytes(data[:8].tobytes(), "little")
        if size > data.nbytes - 8:
            raise ArtifactError(f"{path}: header of {size} bytes exceeds the file")
        try:
            self.header = json.loads(data[8 : 8 + size].tobytes())
        except ValueError as exc:
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


def _aligned(size: int) -> npt.NDArray[np.uint8]:
    """Memory for a file; NumPy asks for large pages for arrays of their size."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size]


def _read(path: Path, start: int, data: npt.NDArray[np.uint8]) -> None:
    """Fills `data` with the file's bytes from `start` on."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < data.nbytes:
            count = file.readinto(data[done:].data)
            if not count:
                raise OSError(f"ends after {start + done} bytes")
            done += count
