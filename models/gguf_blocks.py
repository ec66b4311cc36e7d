"""GGUF blocks taken apart into codes, scales and minimums: exact, and vectorized over the blocks.

A block holds 32 values (256 for the K types) as packed codes with a float16 scale; K types add
packed sub-scales, one for each group of 16 or 32.
Layouts after ggml-quants.h; the tests compare every one with `gguf.quants.dequantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize

from llmc.errors import UnsupportedError
from llmc.formats import FORMATS, NestedScales, QuantizedMatrix

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """Of n blocks: codes `[n, 32 or 256]`; scales and mins `[n, 1]` float16; of K types the
    sub-scales of both `[n, groups]` int8.
    """

    codes: Array
    scales: Array
    mins: Array | None = None
    sub_scales: Array | None = None
    sub_mins: Array | None = None


_FLOATS: dict[GGMLQuantizationType, np.dtype[Any]] = {  # stored values, not blocks
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_IQ4_NL_VALUES = np.array(FORMATS["iq4_nl"].codebook, dtype=np.int8)
_CHUNK_VALUES = 1 << 20  # values worked on at once


def take_apart(type_: GGMLQuantizationType, blocks: Array) -> QuantizedMatrix | None:
    """The matrix `[M, K]` whose rows are `blocks` `[M, bytes]` uint8; None where no format fits.

    Codes, scales and minimums are the file's own: nothing is rounded or quantized again.
    """
    split = _SPLITTERS.get(type_)
    if split is None:
        return None
    format_ = FORMATS[type_.name.lower()]
    size, num_bytes = GGML_QUANT_SIZES[type_]
    rows, k = blocks.shape[0], blocks.shape[1] // num_bytes * size
    codes = np.empty((rows, k), dtype=format_.code_dtype)
    arrays: dict[str, list[Array]] = {}
    for chunk in _chunks(rows, k):
        parts = split(np.ascontiguousarray(blocks[chunk]).reshape(-1, num_bytes))
        codes[chunk] = parts.codes.reshape(-1, k)
        for name in ("scales", "mins", "sub_scales", "sub_mins"):
            part = getattr(parts, name)
            if part is not None:
                arrays.setdefault(name, []).append(part.reshape(len(codes[chunk]), -1))
    whole = {name: np.concatenate(chunks) for name, chunks in arrays.items()}
    if format_.sub_scales is None:
        return QuantizedMatrix(
            format=format_, codes=codes, scales=whole["scales"], mins=whole.get("mins")
        )
    scales = NestedScales(supers=whole["scales"], subs=whole["sub_scales"])
    mins = NestedScales(supers=whole["mins"], subs=whole["sub_mins"]) if format_.has_min else None
    return QuantizedMatrix.of_nested(format_, codes, scales, mins)


def to_dense(type_: GGMLQuantizationType, blocks: Array) -> Array:
    """The values of `blocks` `[M, bytes]` uint8: float types as stored, block types as float32.

    Raises UnsupportedError for a type that cannot be dequantized.
    """
    if type_ in _FLOATS:
        return np.ascontiguousarray(blocks).view(_FLOATS[type_])
    size, num_bytes = GGML_QUANT_SIZES[type_]
    rows, k = blocks.shape[0], blocks.shape[1] // num_bytes * size
    values = np.empty((rows, k), dtype=np.float32)
    for chunk in _chunks(rows, k):
        values[chunk] = _dequantize(type_, blocks[chunk])
    return values


def _chunks(rows: int, k: int) -> Iterator[slice]:
    """Slices of rows, so that intermediate arrays stay small and in the cache."""
    step = max(1, _CHUNK_VALUES // k)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _dequantize(type_: GGMLQuantizationType, blocks: Array) -> Array:
    matrix = take_apart(type_, blocks)
    if matrix is not None:
        return matrix.dequantize()
    try:
        values: Array = gguf_dequantize(np.ascontiguousarray(blocks), type_)
    except NotImplementedError as exc:
        raise UnsupportedError(
            f"GGUF type {type_.name} cannot be read",
            hint="use a file with another quantization, e.g. Q4_K_M or Q8_0",
        ) from exc
    return values


def _f16(raw: Array) -> Array:
    return np.ascontiguousarray(raw).view(np.float16)


def _bits(raw: Array, width: int, rows: int) -> Array:
    """Fields of `width` bits: each `rows` bytes give all their lowest fields, then the next."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    fields: Array = (raw.reshape(len(raw), -1, 1, rows) >> shifts) & np.uint8((1 << width) - 1)
    return fields.reshape(len(raw), -1)


def _q4_0(b: Array) -> _Parts:
    return _Parts(codes=_bits(b[:, 2:], 4, 16), scales=_f16(b[:, :2]))


def _q4_1(b: Array) -> _Parts:
    return _Parts(codes=_bits(b[:, 4:], 4, 16), scales=_f16(b[:, :2]), mins=_f16(b[:, 2:4]))


def _q5_codes(high: Array, low: Array) -> Array:
    """32 codes from four bytes of fifth bits (value i is bit i) and 16 bytes of low halves."""
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    codes: Array = _bits(low, 4, 16) | (fifth << np.uint8(4))
    return codes


def _q5_0(b: Array) -> _Parts:
    codes = _q5_codes(b[:, 2:6], b[:, 6:]).astype(np.int8) - np.int8(16)
    return _Parts(codes=codes, scales=_f16(b[:, :2]))


def _q5_1(b: Array) -> _Parts:
    codes = _q5_codes(b[:, 4:8], b[:, 8:])
    return _Parts(codes=codes, scales=_f16(b[:, :2]), mins=_f16(b[:, 2:4]))


def _q8_0(b: Array) -> _Parts:
    return _Parts(codes=np.ascontiguousarray(b[:, 2:]).view(np.int8), scales=_f16(b[:, :2]))


def _q2_k(b: Array) -> _Parts:
    return _Parts(
        codes=_bits(b[:, 16:80], 2, 32),
        scales=_f16(b[:, 80:82]),
        mins=-_f16(b[:, 82:84]),
        sub_scales=(b[:, :16] & 15).astype(np.int8),
        sub_mins=(b[:, :16] >> 4).astype(np.int8),
    )


def _q3_k(b: Array) -> _Parts:
    low, high = _bits(b[:, 96:104], 4, 8), _bits(b[:, 104:108], 2, 4)
    # Values -4…3: the third bit set means no offset.
    codes = _bits(b[:, 32:96], 2, 32) | (_bits(b[:, :32], 1, 32) << np.uint8(2))
    return _Parts(
        codes=codes.astype(np.int8) - np.int8(4),
        scales=_f16(b[:, 108:110]),
        sub_scales=(low | (high << np.uint8(4))).astype(np.int8) - np.int8(32),
    )


def _six_bits(b: Array) -> dict[str, Array]:
    """Scales and negated minimums of Q4_K and Q5_K: 12 bytes hold 8 sub-scales of each."""
    low, mid, high = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    mins = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)
    return {
        "scales": _f16(b[:, :2]),
        "mins": -_f16(b[:, 2:4]),
        "sub_scales": scales.astype(np.int8),
        "sub_mins": mins.astype(np.int8),
    }


def _q4_k(b: Array) -> _Parts:
    return _Parts(codes=_bits(b[:, 16:], 4, 32), **_six_bits(b))


def _q5_k(b: Array) -> _Parts:
    codes = _bits(b[:, 48:], 4, 32) | (_bits(b[:, 16:48], 1, 32) << np.uint8(4))
    return _Parts(codes=codes, **_six_bits(b))


def _q6_k(b: Array) -> _Parts:
    codes = _bits(b[:, :128], 4, 64) | (_bits(b[:, 128:192], 2, 32) << np.uint8(4))
    return _Parts(
        codes=codes.astype(np.int8) - np.int8(32),
        scales=_f16(b[:, 208:210]),
        sub_scales=np.ascontiguousarray(b[:, 192:208]).view(np.int8),
    )


def _iq4_nl(b: Array) -> _Parts:
    return _Parts(codes=_IQ4_NL_VALUES[_bits(b[:, 2:], 4, 16)], scales=_f16(b[:, :2]))


_SPLITTERS: dict[GGMLQuantizationType, Callable[[Array], _Parts]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q5_0: _q5_0,
    GGMLQuantizationType.Q5_1: _q5_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q2_K: _q2_k,
    GGMLQuantizationType.Q3_K: _q3_k,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q5_K: _q5_k,
    GGMLQuantizationType.Q6_K: _q6_k,
    GGMLQuantizationType.IQ4_NL: _iq4_nl,
}
