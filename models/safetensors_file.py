"""A safetensors file: header checked against the file's length, tensors memory-mapped.

Layout (https://github.com/huggingface/safetensors#format): eight bytes of header length, a JSON
header, then the tensors' bytes. The library's errors name neither file nor tensor; these do.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmc.errors import ImportModelError, UnsupportedError

_MAX_HEADER_BYTES = 100_000_000  # the library's own limit
_HINT = "the file is damaged or incomplete: download it again"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    path: Path
    name: str
    dtype: str  # as the file says, e.g. "BF16"
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]  # its bytes, memory-mapped
    mapping: mmap.mmap  # of the whole file

    def read(self) -> npt.NDArray[Any]:
        """The values, read-only; raises UnsupportedError for a type that NumPy cannot hold.

        What was read of the file before is taken out of this process's memory, not out of views:
        it comes back where somebody looks again.
        """
        if self.dtype not in _DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {self.name!r} is stored as {self.dtype}",
                hint="use a checkpoint in float32, float16 or bfloat16",
            )
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)
        return self.data.view(_DTYPES[self.dtype]).reshape(self.shape)


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; raises ImportModelError naming what is wrong."""
    size = path.stat().st_size
    if size < 8:
        raise ImportModelError(
            f"{path}: {size} bytes, shorter than a safetensors header", hint=_HINT
        )
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(view[:8], "little")
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise ImportModelError(
            f"{path}: the header claims {length} bytes, the file has {size}", hint=_HINT
        )
    data = np.frombuffer(view, dtype=np.uint8)[8 + length :]
    header = _parse(path, view[8 : 8 + length])
    return {
        name: _entry(path, name, entry, data, view)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key appears twice")
        return found

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise ImportModelError(f"{path}: the header is not JSON: {exc}", hint=_HINT) from exc
    if not isinstance(header, dict):
        raise ImportModelError(
            f"{path}: the header is {str(header)[:60]!r}, expected an object", hint=_HINT
        )
    return header


def _entry(
    path: Path, name: str, entry: object, data: npt.NDArray[np.uint8], mapping: mmap.mmap
) -> StoredTensor:
    def wrong(what: str) -> ImportModelError:
        return ImportModelError(f"{path}: tensor {name!r} {what}", hint=_HINT)

    if not isinstance(entry, dict):
        raise wrong(f"is {str(entry)[:60]!r}, expected an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str):
        raise wrong(f"has dtype {dtype!r}, expected a string")
    shape = _sizes(entry.get("shape"))
    if shape is None:
        raise wrong(f"has shape {str(entry.get('shape'))[:60]}, expected sizes")
    offsets = _sizes(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"has data_offsets {str(entry.get('data_offsets'))[:60]}, expected two")
    begin, end = offsets
    if end > len(data):
        raise wrong(f"ends at byte {end}, beyond the end of the file's data at {len(data)}")
    if dtype in _DTYPES:
        expected = math.prod(shape) * _DTYPES[dtype].itemsize
        if end - begin != expected:
            raise wrong(f"has {end - begin} bytes, its shape {shape} as {dtype} needs {expected}")
    return StoredTensor(
        path=path,
        name=name,
        dtype=dtype,
        shape=tuple(shape),
        data=data[begin:end],
        mapping=mapping,
    )


def _sizes(value: object) -> list[int] | None:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        return None
    return value
