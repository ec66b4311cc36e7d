"""Layout "panel16": the order in which the CPU kernels read a weight matrix `[M, K]`.

Sixteen output rows lie across a vector, so that a kernel broadcasts one activation and needs no
horizontal sum. Rows are padded with zeros to whole panels; a panel is contiguous and is read from
front to back once.

Codes narrower than 32 bits are gathered into one 32-bit word per row, `codes_per_word` consecutive
input features each: one full-width load brings 32 / bits vectors, and each leaves the word by one
AND (or one shift) before its conversion, where byte-wise storage pays a widening load per 16 codes.
Four-bit words hold feature `j` in the low and `j + 4` in the high half of byte `j`, the order that
byte dot products (VNNI, dot-prod) want as well. Eight-bit codes without a minimum are stored plus
128, so that every code is unsigned.

    format     array     shape                         dtype
    f32, f16   values    [panels, K, 16]               float32, float16
    bf16       values    [panels, ceil(K / 2), 16]     int32 (even feature in the low half)
    8 bit      codes     [panels, ceil(K / 4), 16]     int32
    4 bit      codes     [panels, ceil(K / 8), 16]     int32
    affine     scales    [panels, num_groups, 16]      the format's scale_dtype
               mins      the same, where has_min

A stack of X matrices (experts) has one more axis in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from llmc.errors import CompileError
from llmc.formats import QuantizedMatrix, WeightFormat

LAYOUT = "panel16"
PANEL = 16
"""Output rows across one vector."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedArray:
    """One stored array of a packed matrix: what follows the weight's name, shape and NumPy dtype
    name.
    """

    suffix: str
    shape: tuple[int, ...]
    dtype: str


def ceildiv(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


def code_offsets(fmt: WeightFormat) -> tuple[int, ...]:
    """The input feature, relative to its word's first, at each bit position from the lowest up."""
    if fmt.bits == 4:
        return (0, 4, 1, 5, 2, 6, 3, 7)
    if fmt.name == "f16":
        return (0,)  # a 16-lane float16 load converts in one instruction as it is
    return tuple(range(32 // fmt.bits))


def codes_per_word(fmt: WeightFormat) -> int:
    """Input features that one stored element holds."""
    return len(code_offsets(fmt))


def stored_zero_point(fmt: WeightFormat) -> int:
    """What is subtracted from a code as stored in a word (always unsigned) before it is scaled."""
    if fmt.is_float or fmt.has_min:
        return 0
    return 1 << (fmt.bits - 1)


def num_panels(m: int) -> int:
    """Panels of m output rows."""
    return ceildiv(m, PANEL)


def packed_arrays(
    fmt: WeightFormat, m: int, k: int, *, num_experts: int | None = None
) -> list[PackedArray]:
    """The arrays that `pack` makes of a matrix `[m, k]` (or of a stack of `num_experts`), in its
    order.

    Raises CompileError where the format cannot hold k input features.
    """
    if m < 1 or k < 1:
        raise CompileError(f"a weight matrix has shape [{m}, {k}]; both have to be at least 1")
    lead = (num_panels(m),) if num_experts is None else (num_experts, num_panels(m))
    words = ceildiv(k, codes_per_word(fmt))
    if fmt.float_dtype is not None:
        dtype = "int32" if fmt.bits == 16 and codes_per_word(fmt) == 2 else fmt.float_dtype
        return [PackedArray(suffix="values", shape=(*lead, words, PANEL), dtype=dtype)]
    try:
        groups = fmt.num_groups(k)
    except ValueError as exc:
        raise CompileError(
            str(exc), hint="choose a format with a smaller group, or one float format"
        ) from exc
    if groups > 1 and fmt.group % codes_per_word(fmt):
        raise CompileError(
            f"{fmt.name}: a group of {fmt.group} codes does not fill whole words of 32 bits"
        )
    arrays = [PackedArray(suffix="codes", shape=(*lead, words, PANEL), dtype="int32")]
    for suffix in ("scales", "mins") if fmt.has_min else ("scales",):
        arrays.append(
            PackedArray(suffix=suffix, shape=(*lead, groups, PANEL), dtype=fmt.scale_dtype)
        )
    return arrays


Matrix = Array | QuantizedMatrix


def pack(fmt: WeightFormat, matrix: Matrix | Sequence[Matrix]) -> list[Array]:
    """Packs a matrix `[M, K]`, or a stack of X equal ones, into the arrays of `packed_arrays`.

    Float formats take a dense array (any float dtype, `[M, K]` or `[X, M, K]`) and round it to
    their own; affine formats take a QuantizedMatrix or a sequence of them. Raises CompileError on a
    mismatch.
    """
    if (isinstance(matrix, np.ndarray) and matrix.ndim == 2) or isinstance(matrix, QuantizedMatrix):
        return _pack_matrix(fmt, matrix)
    stack = list(matrix)
    if not stack:
        raise CompileError("an empty stack of matrices cannot be packed")
    m, k = _shape(stack[0])
    arrays = packed_arrays(fmt, m, k, num_experts=len(stack))
    packed: list[Array] = [np.empty(a.shape, a.dtype) for a in arrays]
    for index, one in enumerate(stack):
        if _shape(one) != (m, k):
            raise CompileError(f"matrix {index} of a stack of [{m}, {k}] has shape {_shape(one)}")
        for target, array in zip(packed, _pack_matrix(fmt, one), strict=True):
            target[index] = array
    return packed


def _shape(matrix: Matrix) -> tuple[int, ...]:
    return matrix.codes.shape if isinstance(matrix, QuantizedMatrix) else matrix.shape


def _pack_matrix(fmt: WeightFormat, matrix: Matrix) -> list[Array]:
    m, k = _shape(matrix)
    arrays = packed_arrays(fmt, m, k)
    if fmt.float_dtype is not None:
        if isinstance(matrix, QuantizedMatrix):
            raise CompileError(f"{fmt.name}: got a matrix in {matrix.format.name}, expected values")
        dense = matrix.astype(_FLOAT_DTYPES[fmt.float_dtype], copy=False)
        codes = dense.view(np.uint16) if fmt.float_dtype == "bfloat16" else dense
        parts: list[Array] = [_pack_codes(fmt, codes)]
    else:
        if not isinstance(matrix, QuantizedMatrix) or matrix.format != fmt:
            found = matrix.format.name if isinstance(matrix, QuantizedMatrix) else "dense values"
            raise CompileError(f"{fmt.name}: got {found}, expected codes and scales of {fmt.name}")
        shift = stored_zero_point(fmt) - fmt.zero_point
        codes = (matrix.codes.astype(np.int16) + shift).astype(np.uint8) if shift else matrix.codes
        parts = [_pack_codes(fmt, codes), _pack_rows(matrix.scales)]
        if fmt.has_min:
            if matrix.mins is None:
                raise CompileError(f"{fmt.name}: the matrix has no minimums")
            parts.append(_pack_rows(matrix.mins))
    for array, part in zip(arrays, parts, strict=True):
        assert part.shape == array.shape, (fmt.name, array, part.shape)
    return [part.astype(a.dtype, copy=False) for a, part in zip(arrays, parts, strict=True)]


_FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def _pack_codes(fmt: WeightFormat, codes: Array) -> Array:
    """`[M, K]` → `[panels, words, 16]`, several codes a word where they are narrower than 32
    bits.
    """
    offsets = code_offsets(fmt)
    if len(offsets) == 1:
        return _pack_rows(codes)
    m, k = codes.shape
    width = len(offsets)
    words = np.zeros((m, ceildiv(k, width)), np.uint32)
    for position, offset in enumerate(offsets):
        column = codes[:, offset::width].astype(np.uint32)
        words[:, : column.shape[1]] |= column << np.uint32(position * fmt.bits)
    return _pack_rows(words.view(np.int32))


def _pack_rows(rows: Array) -> Array:
    """`[M, N]` → `[panels, N, 16]`, missing rows zero."""
    m, n = rows.shape
    panels = num_panels(m)
    if m % PANEL:
        padded = np.zeros((panels * PANEL, n), rows.dtype)
        padded[:m] = rows
        rows = padded
    return np.ascontiguousarray(rows.reshape(panels, PANEL, n).transpose(0, 2, 1))
