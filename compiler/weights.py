"""Runs the weight plan: the model's tensors become the artifact's packed arrays, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Protocol

import ml_dtypes  # noqa: F401 - makes "bfloat16" a NumPy dtype
import numpy as np
import numpy.typing as npt
from tvm import relax

from llmc.artifact import WeightTensor
from llmc.compiler.quantizer import Grid, fit_grid, for_blocks, quantize, quantized_values
from llmc.compiler.streamed_model import Rows
from llmc.compiler.weight_plan import Weights, WeightSpec
from llmc.errors import ImportModelError
from llmc.formats import FORMATS, QuantizedMatrix, WeightFormat, concatenate
from llmc.models.source import SourceTensor
from llmc.targets.base import Array, Matrix, Target

ALIGNMENT = 64
FILE_BYTES = 128 * 2**20
"""That a file's arrays begin within: files are read and hashed side by side."""
_MOST_FILES = 64
_LARGE_PAGE = 2 * 2**20

Grids = dict[str, list[Grid]]
"""What the matrices of a source (one, or one an expert) were rounded to, by the source's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """One weight argument of the compiled function, in order."""

    name: str
    spec: WeightSpec
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def arguments(params: list[relax.Var], weights: Weights) -> list[Argument]:
    """The weight arguments among `params`, in order."""
    return [
        Argument(
            name=p.name,
            spec=weights[p.name],
            shape=tuple(int(e) for e in p.ty.shape),
            dtype=str(p.ty.dtype),
        )
        for p in params
        if p.name in weights
    ]


def describe(wanted: list[Argument]) -> list[WeightTensor]:
    """The arguments for the manifest."""
    file_of = {a.name: name for name, inside in _files(wanted).items() for a in inside}
    return [
        WeightTensor(
            name=a.name,
            file=file_of[a.name],
            dtype=a.dtype,
            shape=list(a.shape),
            format=a.spec.format,
            layout=a.spec.layout,
            sources=a.spec.sources,
            num_bytes=a.num_bytes,
        )
        for a in wanted
    ]


def _files(wanted: list[Argument]) -> dict[str, list[Argument]]:
    """The arguments of each file, by its name."""
    *begins, total = accumulate((a.num_bytes for a in wanted), initial=0)
    size = max(FILE_BYTES, -(-total // _MOST_FILES))
    files = groupby(zip(begins, wanted, strict=True), key=lambda placed: placed[0] // size)
    return {
        f"weights-{i:05}.safetensors": [argument for _, argument in placed]
        for i, (_, placed) in enumerate(files, 1)
    }


def write_weights(
    folder: Path,
    wanted: list[Argument],
    tensors: Mapping[str, SourceTensor],
    target: Target,
    on_progress: Callable[[float], None],
) -> Grids:
    """Writes all arguments into safetensors files; what was rounded to.

    Some rows of one weight are in memory at a time. Large arrays start at multiples of 64 bytes.
    """
    grids: Grids = {}
    with ExitStack() as stack:
        files: dict[str, _File] = {}
        for name, inside in _files(wanted).items():
            file = _File(stack.enter_context((folder / name).open("wb")), inside)
            files |= dict.fromkeys((a.name for a in inside), file)

        def write(argument: Argument, array: Array, bytes_before: int = 0) -> None:
            files[argument.name].write(argument, array, bytes_before)

        done, end = 0, sum(a.num_bytes for a in wanted)
        # Backwards: what the system still holds of the files are the layers that a reference,
        # computed from the first layer on, reads first.
        backwards = reversed(wanted)
        for _, weight in groupby(backwards, key=lambda a: (a.spec.sources, a.spec.part is None)):
            parts = list(weight)
            if parts[0].spec.part is None:
                for argument in parts:
                    write(argument, _plain(argument, tensors))
            else:
                grids |= _pack(parts, tensors, target, write)
            done += sum(argument.num_bytes for argument in parts)
            on_progress(done / max(end, 1))
    return grids


class _File:
    """A safetensors file of some arguments, whose parts are written in any order."""

    def __init__(self, file: BinaryIO, inside: list[Argument]) -> None:
        self._file = file
        self._begins: dict[str, int] = {}
        self._lock = Lock()
        self._filled = False
        header: dict[str, object] = {}
        end = 0
        # Odd sizes last, so that they move nothing behind them off its alignment.
        for argument in sorted(inside, key=lambda a: a.num_bytes % ALIGNMENT != 0):
            self._begins[argument.name] = end
            end += argument.num_bytes
            header[argument.name] = {
                "dtype": _SAFETENSORS_DTYPES[argument.dtype],
                "shape": list(argument.shape),
                "data_offsets": [self._begins[argument.name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self._size = len(self._header) + end

    def write(self, argument: Argument, array: Array, bytes_before: int) -> None:
        """Writes an array, or a part of it that `bytes_before` others precede."""
        with self._lock:
            if not self._filled:
                self._fill()
            self._file.seek(len(self._header) + self._begins[argument.name] + bytes_before)
            self._file.write(np.ascontiguousarray(array).data)

    def _fill(self) -> None:
        """Writes header and zeros, in order and in parts of a large page.

        Linux then keeps the file in such pages, into which parts are written ten times as fast as
        into small ones, and as which whoever maps the file reads it.
        """
        zeros = bytes(_LARGE_PAGE)
        for begin in range(0, self._size, _LARGE_PAGE):
            self._file.write(memoryview(zeros)[: self._size - begin])
        self._file.seek(0)
        self._file.write(self._header)
        self._filled = True


_SAFETENSORS_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
}


class _Write(Protocol):
    """Writes an array, or some of its contiguous parts."""

    def __call__(self, argument: Argument, array: Array, bytes_before: int = 0) -> None: ...


def _plain(argument: Argument, tensors: Mapping[str, SourceTensor]) -> Array:
    """Norm weights, biases, sinks: float32, one after the other."""
    arrays = [_source(tensors, s).read().astype(np.float32) for s in argument.spec.sources]
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if joined.shape != argument.shape:
        raise ImportModelError(
            f"{argument.spec.sources}: shape {joined.shape}, expected {argument.shape}"
        )
    return joined


def _pack(
    parts: list[Argument], tensors: Mapping[str, SourceTensor], target: Target, write: _Write
) -> Grids:
    """Writes arrays of one packed weight; the grids of those of its sources that were rounded.

    Some panels at a time are rounded, packed and written while they are in a core's cache: to go
    through memory that is new each time would take longer than all that is computed.
    """
    spec = parts[0].spec
    fmt = FORMATS[spec.format]
    matrices = stored_matrices(spec, tensors)
    panels = -(-matrices[0].shape[0] // target.panel)
    grids = [m.empty_grid(fmt) for m in matrices]

    for index, matrix in enumerate(matrices):

        def write_rows(rows: slice, index: int = index, matrix: StoredMatrix = matrix) -> None:
            stored, grid = matrix.rows(rows), grids[index]
            if grid is not None and not isinstance(stored, QuantizedMatrix):
                stored = quantize(stored, fmt)
                grid.take_rows(rows).copy_from(stored)
            arrays = target.pack(fmt, stored)
            before = index * panels + rows.start // target.panel
            for argument in parts:
                assert argument.spec.part is not None
                panel_bytes, rest = divmod(argument.num_bytes, panels * len(matrices))
                array = arrays[argument.spec.part]
                assert array.dtype == np.dtype(argument.dtype), argument
                assert (array.nbytes, rest) == (panel_bytes * len(array), 0), argument
                write(argument, array, before * panel_bytes)

        for_blocks(matrix.shape, write_rows, multiple=target.panel)
    found: Grids = {}
    for matrix, grid in zip(matrices, grids, strict=True):
        if grid is not None:
            for name, rows in zip(spec.sources, matrix.slices(), strict=True):
                found.setdefault(name, []).append(grid.take_rows(rows))
    return found


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Matrices of the checkpoint, one below the other, of which some rows are taken at a time."""

    parts: list[Matrix]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows of all of them, columns."""
        shapes = [_shape(part) for part in self.parts]
        return sum(m for m, _ in shapes), shapes[0][1]

    def rows(self, wanted: slice) -> Matrix:
        """Rows `[start, stop)`, as they are stored."""
        found: list[Matrix] = []
        for part, place in zip(self.parts, self.slices(), strict=True):
            begin, end = max(wanted.start, place.start), min(wanted.stop, place.stop)
            if begin < end:
                inside = slice(begin - place.start, end - place.start)
                found.append(_take_rows(part, inside))
        if len(found) == 1:
            return found[0]
        codes = [part for part in found if isinstance(part, QuantizedMatrix)]
        if codes:
            return concatenate(codes)
        return np.concatenate([np.asarray(part, np.float32) for part in found])

    def empty_grid(self, fmt: WeightFormat) -> Grid | None:
        """Where what its rows are rounded to is put; None where nothing is rounded."""
        if fmt.is_float or isinstance(self.parts[0], QuantizedMatrix):
            return None
        return Grid.empty(fmt, *self.shape)

    def slices(self) -> list[slice]:
        """Where the rows of each part are."""
        ends = np.cumsum([0, *(_shape(part)[0] for part in self.parts)]).tolist()
        return [slice(begin, end) for begin, end in pairwise(ends)]


def _take_rows(matrix: Matrix, rows: slice) -> Matrix:
    return matrix.take_rows(rows) if isinstance(matrix, QuantizedMatrix) else matrix[rows]


def _shape(matrix: Matrix) -> tuple[int, int]:
    m, k = matrix.codes.shape if isinstance(matrix, QuantizedMatrix) else matrix.shape
    return m, k


def stored_matrices(spec: WeightSpec, tensors: Mapping[str, SourceTensor]) -> list[StoredMatrix]:
    """A weight's matrix `[M, K]`, or one for each expert, before anything is rounded: codes where
    the sources have those of the format.
    """
    sources = [_source(tensors, name) for name in spec.sources]
    kept = [s.read_quantized() if _has_codes(s, spec) else None for s in sources]
    parts = [
        _matrices(source, None if None in kept else codes, spec)
        for source, codes in zip(sources, kept, strict=True)
    ]
    return [StoredMatrix(list(of_expert)) for of_expert in zip(*parts, strict=True)]


def _matrices(
    source: SourceTensor, codes: QuantizedMatrix | None, spec: WeightSpec
) -> list[Matrix]:
    """One tensor's matrices, of its codes or its values."""
    if codes is not None:
        num_experts = source.shape[0] if len(source.shape) == 3 else 1
        m = len(codes.codes) // num_experts
        return [codes.take_rows(slice(x * m, x * m + m)) for x in range(num_experts)]
    values = source.read()
    if spec.transposed:
        values = np.swapaxes(values, -1, -2)
    return list(values) if len(source.shape) == 3 else [values]


def stored_formats(tensors: Mapping[str, SourceTensor]) -> dict[str, str]:
    """Name -> the format that each tensor can have without being quantized again.

    That is its stored one, or "f32" where its blocks cannot be read in the model's order: some
    converters transpose what the model reads, so that the file's groups lie along the wrong axis.
    Only reading a tensor's blocks shows it, so one is read for all that differ in their numbers
    alone (layers, experts): they come out of the file in the same way.
    """
    kept: dict[tuple[str, tuple[int, ...], str], bool] = {}
    formats: dict[str, str] = {}
    for name, tensor in tensors.items():
        fmt = FORMATS.get(tensor.stored)
        if fmt is None or fmt.is_float:
            formats[name] = tensor.stored
            continue
        kind = (re.sub(r"\d+", "#", name), tensor.shape, tensor.stored)
        if kind not in kept:
            kept[kind] = tensor.read_quantized() is not None
        formats[name] = tensor.stored if kept[kind] else "f32"
    return formats


def _has_codes(source: SourceTensor, spec: WeightSpec) -> bool:
    """Whether the source holds what the spec asks for, nothing to be rounded."""
    stored = source.stored == spec.format and not FORMATS[spec.format].is_float
    return stored and source.codes_transposed == spec.transposed


def dequantized(
    name: str, spec: WeightSpec, tensors: Mapping[str, SourceTensor], grids: Grids | None = None
) -> npt.NDArray[np.float32] | Rows:
    """One source tensor's values as the kernels see them, in the model's own shape.

    With the grids of `write_weights` none is searched for again.
    """
    source = _source(tensors, name)
    if spec.part is None:
        return source.read().astype(np.float32)
    fmt = FORMATS[spec.format]
    matrices = stored_matrices(replace(spec, sources=[name]), tensors)
    found = (grids or {}).get(name)

    def values(index: int, rows: slice) -> npt.NDArray[np.float32]:
        matrix = matrices[index].rows(rows)
        if isinstance(matrix, QuantizedMatrix):
            return matrix.dequantize()
        if fmt.is_float:
            return matrix.astype(fmt.float_dtype).astype(np.float32, copy=False)
        grid = fit_grid(matrix, fmt) if found is None else found[index].take_rows(rows)
        return quantized_values(matrix, grid)

    def read(index: int, rows: slice) -> npt.NDArray[np.float32]:
        if not spec.transposed:
            return values(index, rows)
        return values(index, slice(0, matrices[index].shape[0])).T[rows]

    return Rows(shape=source.shape, read=read)


def _source(tensors: Mapping[str, SourceTensor], name: str) -> SourceTensor:
    try:
        return tensors[name]
    except KeyError:
        raise ImportModelError(
            f"the checkpoint has no tensor {name}", hint="download the model again"
        ) from None
