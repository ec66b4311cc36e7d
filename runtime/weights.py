"""Maps or reads an artifact's weights and hands them to the device, to a host's without a copy."""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from llmc.artifact import Manifest, WeightTensor
from llmc.cpu_features import num_cores
from llmc.errors import ArtifactError

_ALIGNMENT = 4096  # of a file in memory: its tensors are then aligned as they are in it
_LARGE_PAGE = 2 * 2**20
_ENOUGH = 0.9  # of a file in large pages: it is read at their speed
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14, which the module mmap has no name for

MakeTensor: TypeAlias = Callable[[npt.NDArray[Any]], Any]


class WeightFiles:
    """An artifact's weight files, which other threads read and hash while the caller goes on.

    A context manager: the threads end with it.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, resident: bool) -> None:
        """Begins. With `resident` tensors are computed with where they lie: a file that the system
        keeps in small pages is then read into large ones, from which a processor reads a quarter
        faster. ArtifactError where a file is missing.
        """
        self._manifest = manifest
        self._resident = resident
        names = dict.fromkeys(w.file for w in manifest.weights)
        paths = {name: manifest.path_of(directory, name) for name in names}
        self._readers = ThreadPoolExecutor(num_cores())
        self._files = {
            name: self._readers.submit(self._open, name, path) for name, path in paths.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
            data = _mapped(path)
            if self._resident and not _is_in_large_pages(data):
                del data  # pages that are mapped count as memory of the process
                data = _read(path)
        except (OSError, ValueError) as exc:
            raise ArtifactError(
                f"{path}: not readable as weights: {exc}",
                hint="the file is damaged: copy or compile the artifact again",
            ) from exc
        self._manifest.check_digest(path, name, hashlib.sha256(data.data).hexdigest())
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


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes as the system keeps them, read by now; OSError where they cannot be.

    Others who map the file share its memory. What is not in memory yet comes in large pages, where
    the system has them for files.
    """
    with path.open("rb") as file:
        # Written pages would be copies of the process's own; DLPack takes no read-only arrays.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), _POPULATE_READ):
        if sys.platform == "linux" and advice is not None:
            try:
                mapped.madvise(advice)
            except OSError as exc:
                if exc.errno != errno.EINVAL:  # unknown to this system
                    raise
    return np.frombuffer(mapped, np.uint8)


def _read(path: Path) -> npt.NDArray[np.uint8]:
    """The file's bytes in memory of this process, for which NumPy asks for large pages."""
    size = path.stat().st_size
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    data = memory[begin : begin + size]
    with path.open("rb", buffering=0) as file:
        done = 0
        while done < size:
            count = file.readinto(data[done:].data)
            if not count:
                raise OSError(f"ends after {done} bytes")
            done += count
    return data


def _is_in_large_pages(data: npt.NDArray[np.uint8]) -> bool:
    possible = data.nbytes // _LARGE_PAGE * _LARGE_PAGE
    return large_page_bytes(data.ctypes.data) >= _ENOUGH * possible


def large_page_bytes(address: int, smaps: Path = Path("/proc/self/smaps")) -> int:
    """Bytes of the file mapped at `address` that are in large pages, as far as the system tells."""
    begin, found = f"{address:x}-", False
    try:
        with smaps.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                found = found or line.startswith(begin)
                if found and line.startswith("FilePmdMapped:"):
                    return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return 0
