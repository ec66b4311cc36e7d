"""The header of a GGUF file, checked against the file's length before anything is allocated.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts,
key/value pairs, tensor table, then the tensors' bytes at an aligned offset. The `gguf` package's
own reader trusts every size in the file and takes two seconds for a vocabulary of 50,000 tokens;
this one trusts none and takes a tenth of a second.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmc.errors import ImportModelError

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list[Scalar]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {  # GGUF value type -> struct format
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MAX_DIMS = 4
_MAX_NAME_BYTES = 65_535
_MAX_ITEMS = 1 << 24  # of a metadata array: vocabularies have under a million
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one character, type, one byte of value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dims, one dimension, type, offset
_HINT = "the file is damaged or incomplete: download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One entry of the tensor table; `shape` is row-major (the reverse of the file's order)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    num_bytes: int

    @property
    def stored(self) -> str:
        """The type's name in lower case, e.g. "q4_1"."""
        return str(self.type.name).lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A checked GGUF file: metadata read, tensors only mapped."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]
    data: npt.NDArray[np.uint8]  # the whole file, memory-mapped

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Reads and checks the header; ImportModelError names the first value that is wrong."""
        if not path.is_file():
            raise ImportModelError(f"{path}: no such file", hint="give the path of a .gguf file")
        size = path.stat().st_size
        if size < 24:
            raise ImportModelError(
                f"{path}: {size} bytes, shorter than a GGUF header of 24 bytes", hint=_HINT
            )
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        version, metadata, tensors = _Header(path, view).read()
        data = np.frombuffer(view, dtype=np.uint8)  # keeps the map alive
        return cls(path=path, version=version, metadata=metadata, tensors=tensors, data=data)

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, a row of blocks per leading index: `[*shape[:-1], row bytes]`."""
        tensor = self.tensors[name]
        raw = self.data[tensor.offset : tensor.offset + tensor.num_bytes]
        rows = math.prod(tensor.shape[:-1])
        return raw.reshape(*tensor.shape[:-1], tensor.num_bytes // rows if rows else 0)

    @property
    def architecture(self) -> str:
        """`general.architecture`; raises ImportModelError where the file has none."""
        return self.string("general.architecture")

    def string(self, key: str) -> str:
        """A required string."""
        value = self.optional_string(key)
        if value is None:
            raise ImportModelError(
                f"{self.path}: metadata key {key!r} is missing",
                hint="convert the model to GGUF with a recent converter",
            )
        return value

    def optional_string(self, key: str) -> str | None:
        """A string, or None where the key is absent."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def optional_int(self, key: str) -> int | None:
        """An integer, or None where the key is absent."""
        value = self.metadata.get(key)
        if value is not None and type(value) is not int:
            raise self._wrong(key, value, "an integer")
        return value

    def optional_bool(self, key: str) -> bool | None:
        """A boolean, or None where the key is absent."""
        value = self.metadata.get(key)
        if value is not None and type(value) is not bool:
            raise self._wrong(key, value, "a boolean")
        return value

    def strings(self, key: str) -> list[str]:
        """An array of strings; empty where the key is absent."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "an array of strings")
        return [str(item) for item in value]

    def numbers(self, key: str) -> list[float]:
        """An array of numbers; empty where the key is absent."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or any(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "an array of numbers")
        return [float(item) for item in value]

    def _wrong(self, key: str, value: object, expected: str) -> ImportModelError:
        return ImportModelError(
            f"{self.path}: metadata key {key!r} is {str(value)[:60]!r}, expected {expected}",
            hint=_HINT,
        )


class _Header:
    """A cursor over the header; every step is checked against the file's length first."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self._path = path
        self._view = view
        self._size = len(view)
        self._at = 0

    def read(self) -> tuple[int, dict[str, Value], dict[str, GgufTensor]]:
        """Version, metadata and tensor table."""
        magic = self._take(4, "the magic")
        if magic != _MAGIC:
            raise self._error(
                f"starts with {magic!r}, expected {_MAGIC!r}", hint="this is not a GGUF file"
            )
        version = self._integer("I", "the version")
        if version not in _VERSIONS:
            raise self._error(
                f"GGUF version {version}, expected 2 or 3 (little-endian)",
                hint="convert the model to GGUF with a recent converter",
            )
        num_tensors = self._count("tensor count", _MIN_TENSOR_BYTES)
        num_pairs = self._count("metadata count", _MIN_PAIR_BYTES)
        metadata: dict[str, Value] = {}
        for _ in range(num_pairs):
            key = self._string("a metadata key", _MAX_NAME_BYTES)
            if key in metadata:
                raise self._error(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(self._integer("I", f"the type of {key!r}"), key)
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        return version, metadata, self._place(entries, self._alignment(metadata))

    def _value(self, kind: int, key: str) -> Value:
        if kind != _ARRAY:
            return self._scalar_reader(kind, key)()
        kind = self._integer("I", f"the element type of {key!r}")
        if kind in _SCALARS:
            fmt = _SCALARS[kind]
            count = self._count(f"length of {key!r}", struct.calcsize(fmt))
            raw = self._take(count * struct.calcsize(fmt), f"the array {key!r}")
            return list(struct.unpack(f"<{count}{fmt}", raw))
        read = self._scalar_reader(kind, key)  # refuses nested arrays and unknown types
        count = self._count(f"length of {key!r}", 8)
        return [read() for _ in range(count)]

    def _scalar_reader(self, kind: int, key: str) -> Callable[[], Scalar]:
        if kind == _STRING:
            return lambda: self._string(f"the value of {key!r}", self._size)
        if kind not in _SCALARS:
            raise self._error(f"metadata key {key!r} has the unknown value type {kind}")
        fmt = f"<{_SCALARS[kind]}"

        def read() -> Scalar:
            value: Scalar
            (value,) = struct.unpack(fmt, self._take(struct.calcsize(fmt), f"the value of {key!r}"))
            return value

        return read

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, expected a power of two")
        return alignment

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor name", _MAX_NAME_BYTES)
        num_dims = self._integer("I", f"the dimensions of {name!r}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self._error(f"tensor {name!r} has {num_dims} dimensions, expected 1 to 4")
        dims = tuple(self._integer("Q", f"a dimension of {name!r}") for _ in range(num_dims))
        kind = self._integer("I", f"the type of {name!r}")
        return name, dims[::-1], kind, self._integer("Q", f"the offset of {name!r}")

    def _place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._error(f"tensor {name!r} appears twice")
            try:
                type_ = GGMLQuantizationType(kind)
            except ValueError:
                raise self._error(
                    f"tensor {name!r} has the unknown type {kind}",
                    hint="upgrade: pip install -U gguf",
                ) from None
            block, block_bytes = GGML_QUANT_SIZES[type_]
            if 0 in shape or shape[-1] % block:
                raise self._error(
                    f"tensor {name!r} of type {type_.name} has shape {list(shape)}, expected"
                    f" rows of a multiple of {block} values"
                )
            # Python integers do not overflow, so an absurd shape fails the comparison below.
            num_bytes = math.prod(shape) // block * block_bytes
            if offset % alignment or start + offset + num_bytes > self._size:
                raise self._error(
                    f"tensor {name!r} lies at byte {start + offset} with {num_bytes} bytes"
                    f" (alignment {alignment}), beyond the end of the file at {self._size}"
                    if not offset % alignment
                    else f"tensor {name!r} has offset {offset}, not a multiple of {alignment}"
                )
            tensors[name] = GgufTensor(
                name=name, shape=shape, type=type_, offset=start + offset, num_bytes=num_bytes
            )
        return tensors

    def _count(self, what: str, min_item_bytes: int) -> int:
        count = self._integer("Q", f"the {what}")
        if count > _MAX_ITEMS:
            raise self._error(f"{what} {count}, expected at most {_MAX_ITEMS}")
        left = self._size - self._at
        if count * min_item_bytes > left:
            raise self._error(
                f"{what} {count} needs at least {count * min_item_bytes} bytes, {left} are left"
            )
        return count

    def _integer(self, fmt: str, what: str) -> int:
        value: int
        (value,) = struct.unpack(f"<{fmt}", self._take(struct.calcsize(f"<{fmt}"), what))
        return value

    def _string(self, what: str, max_bytes: int) -> str:
        length = self._integer("Q", f"the length of {what}")
        if length > max_bytes:
            raise self._error(f"{what} has {length} bytes, expected at most {max_bytes}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self._error(f"{what} is not UTF-8: {exc.reason}") from exc

    def _take(self, num_bytes: int, what: str) -> bytes:
        start, end = self._at, self._at + num_bytes
        if end > self._size:
            raise self._error(
                f"the file ends at byte {self._size}, inside {what} at bytes {start} to {end}"
            )
        self._at = end
        return self._view[start:end]

    def _error(self, message: str, *, hint: str = _HINT) -> ImportModelError:
        return ImportModelError(f"{self._path}: {message}", hint=hint)
