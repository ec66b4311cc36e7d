"""Runs the weight plan: the model's tensors become the artifact's packed arrays, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import ml_dtypes  # noqa: F401 - makes "bfloat16" a NumPy dtype
import numpy as np
import numpy.typing as npt
from tvm import relax

from llmc.artifact import WeightTensor
from llmc.compiler.quantizer import quantize, quantized_values
from llmc.compiler.streamed_model import Stack
from llmc.compiler.weight_plan import Weights, WeightSpec
from llmc.errors import ImportModelError
from llmc.formats import FORMATS, QuantizedMatrix, WeightFormat, concatenate
from llmc.models.source import SourceTensor
from llmc.targets.base import Array, Matrix, Target

WEIGHTS_FILE = "weights-00001.safetensors"
ALIGNMENT = 64


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
    return [
        WeightTensor(
            name=a.name,
            file=WEIGHTS_FILE,
            dtype=a.dtype,
            shape=list(a.shape),
            format=a.spec.format,
            layout=a.spec.layout,
            sources=a.spec.sources,
            num_bytes=a.num_bytes,
        )
        for a in wanted
    ]


def write_weights(
    path: Path,
    wanted: list[Argument],
    tensors: Mapping[str, SourceTensor],
    target: Target,
    on_progress: Callable[[float], None],
) -> None:
    """Writes all arguments into one safetensors file.

    At most one packed weight is in memory at a time. Large arrays start at multiples of 64 bytes.
    """
    # Odd sizes last, so that they move nothing behind them off its alignment.
    order = sorted(wanted, key=lambda a: a.num_bytes % ALIGNMENT != 0)
    header: dict[str, object] = {}
    begin = 0
    for argument in order:
        end = begin + argument.num_bytes
        header[argument.name] = {
            "dtype": _SAFETENSORS_DTYPES[argument.dtype],
            "shape": list(argument.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        data_begin = file.tell()
        done = 0
        for argument, array in _packed(order, tensors, target):
            entry = header[argument.name]
            assert isinstance(entry, dict)
            file.seek(data_begin + entry["data_offsets"][0])
            file.write(np.ascontiguousarray(array).data)
            done += argument.num_bytes
            on_progress(done / max(begin, 1))


_SAFETENSORS_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
}


def _packed(
    order: list[Argument], tensors: Mapping[str, SourceTensor], target: Target
) -> Iterator[tuple[Argument, Array]]:
    """Every argument with its array; the parts of one weight share one packing."""

    def weight(argument: Argument) -> tuple[list[str], bool]:
        return argument.spec.sources, argument.spec.part is None

    for _, group in groupby(order, key=weight):
        parts = list(group)
        spec = parts[0].spec
        if spec.part is None:
            for argument in parts:
                yield argument, _plain(argument, tensors)
            continue
        arrays = pack(spec, tensors, target)
        for argument in parts:
            assert argument.spec.part is not None
            array = arrays[argument.spec.part]
            assert array.shape == argument.shape, (argument.name, array.shape, argument.shape)
            yield argument, array


def _plain(argument: Argument, tensors: Mapping[str, SourceTensor]) -> Array:
    """Norm weights, biases, sinks: float32, one after the other."""
    arrays = [_source(tensors, s).read().astype(np.float32) for s in argument.spec.sources]
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    if joined.shape != argument.shape:
        raise ImportModelError(
            f"{argument.spec.sources}: shape {joined.shape}, expected {argument.shape}"
        )
    return joined


def pack(spec: WeightSpec, tensors: Mapping[str, SourceTensor], target: Target) -> list[Array]:
    """The packed arrays of one weight."""
    matrices, stacked = matrices_of(spec, tensors)
    return target.pack(FORMATS[spec.format], matrices, stacked=stacked)


def matrices_of(spec: WeightSpec, tensors: Mapping[str, SourceTensor]) -> tuple[list[Matrix], bool]:
    """(matrices, stacked): the sources' rows in the spec's format; one an expert if stacked."""
    fmt = FORMATS[spec.format]
    matrices, stacked = _as_stored(spec, tensors)
    if fmt.is_float:
        return matrices, stacked
    return [m if isinstance(m, QuantizedMatrix) else quantize(m, fmt) for m in matrices], stacked


def _as_stored(spec: WeightSpec, tensors: Mapping[str, SourceTensor]) -> tuple[list[Matrix], bool]:
    """The same before anything is rounded: codes where the sources have those of the format."""
    sources = [_source(tensors, name) for name in spec.sources]
    stacked = len(sources[0].shape) == 3
    if not FORMATS[spec.format].is_float and all(_has_codes(s, spec) for s in sources):
        kept = [s.read_quantized() for s in sources]
        exact = [k for k in kept if k is not None]
        if len(exact) == len(kept):
            whole = concatenate(exact)
            if not stacked:
                return [whole], False
            rows = np.arange(len(whole.codes)).reshape(sources[0].shape[0], -1)
            return [whole.take_rows(r) for r in rows], True
    arrays = [s.read() for s in sources]
    if len({array.dtype for array in arrays}) > 1:
        arrays = [array.astype(np.float32) for array in arrays]
    if spec.transposed:
        arrays = [np.swapaxes(array, -1, -2) for array in arrays]
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return list(joined) if stacked else [joined], stacked


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
    return source.stored == spec.format and source.codes_transposed == spec.transposed


def dequantized(
    name: str, spec: WeightSpec, tensors: Mapping[str, SourceTensor]
) -> npt.NDArray[np.float32] | Stack:
    """One source tensor's values as the kernels see them, in the model's own shape."""
    source = _source(tensors, name)
    if spec.part is None:
        return source.read().astype(np.float32)
    fmt = FORMATS[spec.format]
    matrices, stacked = _as_stored(replace(spec, sources=[name]), tensors)

    def values(index: int) -> npt.NDArray[np.float32]:
        matrix = _values(matrices[index], fmt)
        return matrix.T if spec.transposed else matrix

    return Stack(shape=source.shape, read=values) if stacked else values(0)


def _values(matrix: Matrix, fmt: WeightFormat) -> npt.NDArray[np.float32]:
    """What the kernels see of codes, or of what has yet to be rounded."""
    if isinstance(matrix, QuantizedMatrix):
        return matrix.dequantize()
    if fmt.is_float:
        return matrix.astype(fmt.float_dtype).astype(np.float32, copy=False)
    return quantized_values(matrix, fmt)


def _source(tensors: Mapping[str, SourceTensor], name: str) -> SourceTensor:
    try:
        return tensors[name]
    except KeyError:
        raise ImportModelError(
            f"the checkpoint has no tensor {name}", hint="download the model again"
        ) from None
