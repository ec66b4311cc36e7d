"""Layout "panel16": the order in which the CPU kernels read a weight matrix `[M, K]`.

Sixteen output rows lie across a vector, so that a kernel broadcasts one activation and needs no
horizontal sum. Rows are padded with zeros to whole panels; a panel is contiguous and is read from
front to back once.

Codes narrower than 32 bits are gathered into one 32-bit word per row, several consecutive input
features each: one full-width load brings 32 / bits vectors, and each leaves the word by one
AND (or one shift) before its conversion, where byte-wise storage pays a widening load per 16 codes.
A word of b-bit codes holds, in bit field `p` of byte `j`, feature `4 p + j`: each of its fields is
four consecutive features in four bytes, the order that byte dot products (VNNI, dot-prod) want.
Codes without a minimum are stored unsigned, half their range added.

Codes that stand for the values of a code book are stored as indices of 4 bits, which kernels look
up.

Codes of 2, 3, 5 or 6 bits are cut into *planes* of 4, 2 and 1 bits, the lowest bits first, each an
array of words. Kernels put them together into words of four bytes and go on as with 8 bits.

Sub-scales (K types) are whole numbers of so many bits for each group and row. They are stored
unsigned, cut in the same way into planes of bytes, which hold one, two or four consecutive groups,
the first in the lowest bits. A group's scale is its sub-scale times the super-block's, exact in
float32.

    format     array           shape                             dtype
    f32, f16   values          [panels, K, 16]                   float32, float16
    bf16       values          [panels, ceil(K / 2), 16]         int32 (low half: even feature)
    affine     codes           [panels, ceil(K · b / 32), 16]    int32, one array a plane
               scales          [panels, num_groups, 16]          the format's scale_dtype
               mins            the same, where has_min
    K types    codes           as above
               scales          [panels, K / 256, 16]             float16
               sub_scales      [panels, num_groups · b / 8, 16]  uint8, one array a plane
               mins, sub_mins  the same, where has_min

The arrays of a second plane are called codes_high and sub_scales_high.

A stack of X matrices (experts) has one more axis in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmc.errors import CompileError
from llmc.formats import QuantizedMatrix, WeightFormat
from llmc.targets import packing
from llmc.targets.base import Array, Matrix, PackedPart

LAYOUT = "panel16"
PANEL = 16
"""Output rows across one vector."""


def ceildiv(a: int, b: int) -> int:
    """The quotient rounded up."""
    return -(-a // b)


def sub_scale_planes(fmt: WeightFormat) -> tuple[int, ...]:
    """Bits of a sub-scale in each of its arrays, from the lowest bits up; none without any.

    Six bits take a byte where that costs less than 3 % of the weight: one load and nothing to cut.
    """
    if fmt.sub_scales is None:
        return ()
    if fmt.sub_scales.bits == 6:
        return (4, 2) if fmt.group < 32 else (8,)
    return (fmt.sub_scales.bits,)


def plane_suffixes(name: str, planes: tuple[int, ...]) -> tuple[str, ...]:
    """What the arrays of each plane are called."""
    return (name, f"{name}_high")[: len(planes)]


def code_offsets(fmt: WeightFormat) -> tuple[int, ...]:
    """The input feature, relative to its word's first, at each bit position from the lowest up.

    Of words as kernels decode them: codes in planes come as bytes.
    """
    if fmt.name == "f16":
        return (0,)  # a 16-lane float16 load converts in one instruction as it is
    if fmt.is_float:
        return tuple(range(32 // fmt.bits))
    return _offsets(fmt.bits)


def _offsets(bits: int) -> tuple[int, ...]:
    fields = 8 // bits  # of a byte
    return tuple(i % fields * 4 + i // fields for i in range(32 // bits))


def codes_per_word(fmt: WeightFormat) -> int:
    """Input features that one word holds as kernels decode it."""
    return len(code_offsets(fmt))


def stored_zero_point(fmt: WeightFormat) -> int:
    """What is subtracted from a code as stored in a word (always unsigned) before it is scaled."""
    return fmt.zero_code


def num_panels(m: int) -> int:
    """Panels of m output rows."""
    return ceildiv(m, PANEL)


def packed_parts(
    fmt: WeightFormat, m: int, k: int, *, num_experts: int | None = None
) -> list[PackedPart]:
    """The arrays that `pack` makes of a matrix `[m, k]` (or of a stack of `num_experts`), in its
    order.

    Raises CompileError where the format cannot hold k input features.
    """
    packing.check_shape(m, k)
    lead = (num_panels(m),) if num_experts is None else (num_experts, num_panels(m))

    def array(suffix: str, count: int, dtype: str) -> PackedPart:
        return PackedPart(suffix=suffix, shape=(*lead, count, PANEL), dtype=dtype)

    if fmt.float_dtype is not None:
        words = ceildiv(k, codes_per_word(fmt))
        dtype = "int32" if fmt.bits == 16 and codes_per_word(fmt) == 2 else fmt.float_dtype
        return [array("values", words, dtype)]
    groups = _checked_groups(fmt, k)
    planes, subs = fmt.planes, fmt.sub_scales
    arrays = [
        array(suffix, ceildiv(k * bits, 32), "int32")
        for suffix, bits in zip(plane_suffixes("codes", planes), planes, strict=True)
    ]
    for name in ("scales", "mins") if fmt.has_min else ("scales",):
        if subs is None:
            arrays.append(array(name, groups, fmt.scale_dtype))
            continue
        arrays.append(array(name, k // subs.group, "float16"))
        planes = sub_scale_planes(fmt)
        for suffix, bits in zip(plane_suffixes(f"sub_{name}", planes), planes, strict=True):
            arrays.append(array(suffix, ceildiv(groups * bits, 8), "uint8"))
    return arrays


def _checked_groups(fmt: WeightFormat, k: int) -> int:
    """Scales of a row; CompileError where they do not fit k features."""
    groups = packing.num_groups(fmt, k)
    if groups > 1 and fmt.group % codes_per_word(fmt):
        raise CompileError(
            f"{fmt.name}: a group of {fmt.group} codes does not fill whole words of 32 bits"
        )
    if fmt.sub_scales is not None and k % fmt.sub_scales.group:
        raise CompileError(
            f"{fmt.name}: super-blocks of {fmt.sub_scales.group} do not divide {k} input features"
        )
    return groups


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
    codes = values.view(np.uint16) if fmt.float_dtype == "bfloat16" else values
    return [_pack_words(codes, code_offsets(fmt), fmt.bits)]


def _pack_affine(fmt: WeightFormat, matrix: QuantizedMatrix) -> list[Array]:
    shift = stored_zero_point(fmt) - fmt.zero_point
    codes = (matrix.codes.astype(np.int16) + shift).astype(np.uint8) if shift else matrix.codes
    if fmt.codebook is not None:
        codes = np.searchsorted(np.array(fmt.codebook) + shift, codes).astype(np.uint8)
    parts = [_pack_words(p, _offsets(bits), bits) for p, bits in _cut(codes, fmt.planes)]
    scales = [("scales", matrix.scales, matrix.nested_scales)]
    if matrix.mins is not None:
        scales.append(("minimums", matrix.mins, matrix.nested_mins))
    for name, plain, nested in scales:
        if fmt.sub_scales is None:
            parts.append(_pack_rows(plain.astype(fmt.scale_dtype, copy=False)))
        elif nested is None:
            raise CompileError(f"{fmt.name}: the matrix has no sub-scales of its {name}")
        else:
            parts.append(_pack_rows(nested.supers))
            subs = (nested.subs.astype(np.int16) + fmt.sub_scales.zero_point).astype(np.uint8)
            for plane, bits in _cut(subs, sub_scale_planes(fmt)):
                parts.append(_pack_rows(_bytes_of(plane, bits)))
    return parts


def _cut(codes: npt.NDArray[Any], planes: tuple[int, ...]) -> list[tuple[Array, int]]:
    """The planes of unsigned codes, with their bits."""
    if len(planes) == 1:
        return [(codes, planes[0])]
    low = planes[0]
    return [(codes & ((1 << low) - 1), low), (codes >> low, planes[1])]


def _bytes_of(fields: npt.NDArray[Any], bits: int) -> Array:
    """`[M, N]` of b-bit numbers → bytes `[M, ceil(N · b / 8)]`, the first in the lowest bits."""
    per_byte = 8 // bits
    m, n = fields.shape
    packed = np.zeros((m, ceildiv(n, per_byte)), np.uint8)
    for position in range(per_byte):
        column = fields[:, position::per_byte]
        packed[:, : column.shape[1]] |= column << np.uint8(position * bits)
    return packed


def _pack_words(codes: Array, offsets: tuple[int, ...], bits: int) -> Array:
    """`[M, K]` → `[panels, words, 16]`, several codes a word where they are narrower than 32
    bits: the feature at `offsets[i]` in bit `i · bits`.
    """
    if len(offsets) == 1:
        return _pack_rows(codes)
    m, k = codes.shape
    width = len(offsets)
    words = np.zeros((m, ceildiv(k, width)), np.uint32)
    for position, offset in enumerate(offsets):
        column = codes[:, offset::width].astype(np.uint32)
        words[:, : column.shape[1]] |= column << np.uint32(position * bits)
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
