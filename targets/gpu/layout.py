"""Layout "chunk32": the order in which the GPU kernels read a weight matrix `[M, K]`.

A row's codes are cut into chunks of 16 bytes, which is what a thread loads at a time. 32 rows make
a panel (padded with zeros) in which the rows' chunks of the same features lie side by side:
neighbouring threads, each with a row of its own, read neighbouring 16 bytes, and a panel is read
from front to back once.

Chunks are four 32-bit words. Codes of 8 bits lie in the order of the features; 4-bit codes of a
word are those of features 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up, so that features 2i and
2i + 1 stand 16 bits apart: one AND with 0x000f000f gives a pair of them to a 16-bit vector.

    format     array     shape                             dtype
    f32        values    [panels, ceil(K / 4), 32, 4]      float32
    f16        values    [panels, ceil(K / 8), 32, 4]      int32 (even feature in the low half)
    bf16       values    [panels, ceil(K / 8), 32, 4]      int32 (even feature in the low half)
    8 bit      codes     [panels, ceil(K / 16), 32, 4]     int32 (signed bytes where symmetric, or
                                                           e4m3 numbers)
    4 bit      codes     [panels, ceil(K / 32), 32, 4]     int32
    affine     scales    [panels, groups, 32]              the format's scale_dtype
               mins      the same, where has_min

Codes are stored with the bits that kernels multiply, 4 or 8, and sub-scales multiplied out.
`groups` is padded so that every chunk has its scales. A stack of X matrices (experts) has one more
axis in front.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from llmc.errors import CompileError
from llmc.formats import QuantizedMatrix, WeightFormat
from llmc.targets.base import Array, Matrix, PackedPart

LAYOUT = "chunk32"
PANEL = 32
"""Output rows side by side."""
CHUNK_WORDS = 4
CHUNK_BITS = 128

_CODE_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 1, 2, 3), 16: (0, 1), 32: (0,)}
_FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def ceildiv(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


def code_offsets(bits: int) -> tuple[int, ...]:
    """The feature, relative to its word's first, at each bit position from the lowest up."""
    return _CODE_ORDER[bits]


def chunk_features(fmt: WeightFormat) -> int:
    """Input features in a chunk."""
    return CHUNK_BITS // fmt.bits


def num_panels(m: int) -> int:
    """Panels of m output rows."""
    return ceildiv(m, PANEL)


def num_chunks(fmt: WeightFormat, k: int) -> int:
    """Chunks in a row of k features."""
    return ceildiv(k, chunk_features(fmt))


def groups_per_chunk(fmt: WeightFormat) -> int:
    """Scales that the codes of one chunk need."""
    if fmt.is_float or fmt.group == 0:
        return 1
    return max(1, chunk_features(fmt) // fmt.group)


def chunks_per_group(fmt: WeightFormat, k: int) -> int:
    """Chunks that share a scale; 1 where a chunk needs several."""
    if fmt.is_float or fmt.group == 0:
        return num_chunks(fmt, k)
    return max(1, fmt.group // chunk_features(fmt))


def stored_groups(fmt: WeightFormat, k: int) -> int:
    """Scales stored for a row of k features, filled up to whole chunks.

    Raises CompileError where the format's groups do not divide k.
    """
    try:
        groups = fmt.num_groups(k)
    except ValueError as exc:
        raise CompileError(
            str(exc), hint="choose a format with a smaller group, or one float format"
        ) from exc
    return ceildiv(groups, groups_per_chunk(fmt)) * groups_per_chunk(fmt)


def packed_parts(
    fmt: WeightFormat, m: int, k: int, *, num_experts: int | None = None
) -> list[PackedPart]:
    """The arrays that `pack` makes of a matrix `[m, k]` (or of a stack of `num_experts`).

    Raises CompileError where the format cannot hold k input features.
    """
    if m < 1 or k < 1:
        raise CompileError(f"a weight matrix has shape [{m}, {k}]; both have to be at least 1")
    lead = (num_panels(m),) if num_experts is None else (num_experts, num_panels(m))
    chunks = (*lead, num_chunks(fmt, k), PANEL, CHUNK_WORDS)
    if fmt.is_float:
        dtype = "float32" if fmt.bits == 32 else "int32"
        return [PackedPart(suffix="values", shape=chunks, dtype=dtype)]
    parts = [PackedPart(suffix="codes", shape=chunks, dtype="int32")]
    shape = (*lead, stored_groups(fmt, k), PANEL)
    for suffix in ("scales", "mins") if fmt.has_min else ("scales",):
        parts.append(PackedPart(suffix=suffix, shape=shape, dtype=fmt.scale_dtype))
    return parts


def pack(fmt: WeightFormat, matrices: Sequence[Matrix], *, stacked: bool) -> list[Array]:
    """Packs a matrix `[M, K]`, or a stack of equal ones, into the arrays of `packed_parts`.

    Float formats take dense arrays (any float dtype) and round them to their own; affine formats
    take QuantizedMatrix. Raises CompileError on a mismatch.
    """
    if not stacked:
        return _pack_matrix(fmt, matrices[0])
    stack = list(matrices)
    if len(stack) == 1 and isinstance(stack[0], np.ndarray) and stack[0].ndim == 3:
        stack = list(stack[0])
    if not stack:
        raise CompileError("an empty stack of matrices cannot be packed")
    m, k = _shape(stack[0])
    parts = packed_parts(fmt, m, k, num_experts=len(stack))
    packed: list[Array] = [np.empty(p.shape, p.dtype) for p in parts]
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
    parts = packed_parts(fmt, m, k)
    if fmt.float_dtype is not None:
        if isinstance(matrix, QuantizedMatrix):
            raise CompileError(f"{fmt.name}: got a matrix in {matrix.format.name}, expected values")
        dense = matrix.astype(_FLOAT_DTYPES[fmt.float_dtype], copy=False)
        arrays = [_pack_codes(fmt, dense).view(parts[0].dtype)]
    else:
        if not isinstance(matrix, QuantizedMatrix) or matrix.format != fmt:
            found = matrix.format.name if isinstance(matrix, QuantizedMatrix) else "dense values"
            raise CompileError(f"{fmt.name}: got {found}, expected codes and scales of {fmt.name}")
        arrays = [_pack_codes(fmt, matrix.codes), _pack_groups(matrix.scales, parts[1])]
        if fmt.has_min:
            if matrix.mins is None:
                raise CompileError(f"{fmt.name}: the matrix has no minimums")
            arrays.append(_pack_groups(matrix.mins, parts[2]))
    for part, array in zip(parts, arrays, strict=True):
        assert array.shape == part.shape, (fmt.name, part, array.shape)
    return arrays


def _pack_codes(fmt: WeightFormat, codes: Array) -> Array:
    """`[M, K]` → `[panels, chunks, 32, 4]` words."""
    m, k = codes.shape
    features = chunk_features(fmt)
    padded = np.zeros((num_panels(m) * PANEL, num_chunks(fmt, k) * features), codes.dtype)
    padded[:m, :k] = codes
    offsets = code_offsets(fmt.bits)
    words = padded.reshape(len(padded), -1, len(offsets))
    if fmt.bits == 4:
        joined = np.zeros(words.shape[:2], np.uint32)
        for position, offset in enumerate(offsets):
            joined |= words[:, :, offset].astype(np.uint32) << np.uint32(4 * position)
        packed = joined
    else:
        packed = np.ascontiguousarray(words).view(np.uint32)[:, :, 0]
    packed = packed.reshape(num_panels(m), PANEL, num_chunks(fmt, k), CHUNK_WORDS)
    return np.ascontiguousarray(packed.transpose(0, 2, 1, 3)).view(np.int32)


def _pack_groups(rows: Array, part: PackedPart) -> Array:
    """`[M, groups]` → `[panels, padded groups, 32]`, missing ones zero."""
    panels, groups, _ = part.shape
    padded = np.zeros((panels * PANEL, groups), part.dtype)
    padded[: rows.shape[0], : rows.shape[1]] = rows
    return np.ascontiguousarray(padded.reshape(panels, PANEL, groups).transpose(0, 2, 1))
