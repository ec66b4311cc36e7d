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

import numpy as np

from llmc.formats import QuantizedMatrix, WeightFormat
from llmc.targets import packing
from llmc.targets.base import Array, Matrix, PackedPart

LAYOUT = "chunk32"
PANEL = 32
"""Output rows side by side."""
CHUNK_WORDS = 4
CHUNK_BITS = 128

_CODE_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 1, 2, 3), 16: (0, 1), 32: (0,)}


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
    groups = packing.num_groups(fmt, k)
    return ceildiv(groups, groups_per_chunk(fmt)) * groups_per_chunk(fmt)


def packed_parts(
    fmt: WeightFormat, m: int, k: int, *, num_experts: int | None = None
) -> list[PackedPart]:
    """The arrays that `pack` makes of a matrix `[m, k]` (or of a stack of `num_experts`).

    Raises CompileError where the format cannot hold k input features.
    """
    packing.check_shape(m, k)
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


def pack(fmt: WeightFormat, matrices: Sequence[Matrix], *, stacked: bool = False) -> list[Array]:
    """Packs a matrix `[M, K]`, or a stack of equal ones, into the arrays of `packed_parts`.

    Float formats take dense arrays (any float dtype) and round them to their own; affine formats
    take QuantizedMatrix. Raises CompileError on a mismatch.
    """
    return packing.pack(
        fmt,
        matrices,
        stacked=stacked,
        parts_of=packed_parts,
        values=_pack_values,
        affine=_pack_affine,
    )


def _pack_values(fmt: WeightFormat, values: Array) -> list[Array]:
    return [_pack_codes(fmt, values).view(np.float32 if fmt.bits == 32 else np.int32)]


def _pack_affine(fmt: WeightFormat, matrix: QuantizedMatrix) -> list[Array]:
    arrays = [_pack_codes(fmt, matrix.codes), _pack_groups(fmt, matrix.scales)]
    if matrix.mins is not None:
        arrays.append(_pack_groups(fmt, matrix.mins))
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


def _pack_groups(fmt: WeightFormat, rows: Array) -> Array:
    """`[M, groups]` → `[panels, padded groups, 32]`, missing ones zero."""
    m, groups = rows.shape
    stored = ceildiv(groups, groups_per_chunk(fmt)) * groups_per_chunk(fmt)
    padded = np.zeros((num_panels(m) * PANEL, stored), fmt.scale_dtype)
    padded[:m, :groups] = rows
    return np.ascontiguousarray(padded.reshape(-1, PANEL, stored).transpose(0, 2, 1))
