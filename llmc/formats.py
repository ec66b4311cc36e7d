"""Weight formats: how one matrix is stored, as data that models, compiler and targets share.

A format is either a float type or *affine*: integer codes with a scale (and perhaps a minimum) per
group of consecutive input features,

    w[m, k] = code[m, k] · scale[m, k // group] + min[m, k // group]

with signed codes and no minimum where the format is symmetric. Codes of fp8 are small floats (e4m3:
"FP8 Formats for Deep Learning", Micikevicius et al., 2022). Every GGUF block format is affine in
this sense: the K types' scales are products of a small whole number for each group and a float16
for each super-block, which float32 holds exactly (11-bit times at most 8-bit mantissas).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import ml_dtypes  # noqa: F401  (NumPy knows float8_e4m3fn by it)
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class SubScales:
    """Scales and minimums of groups as whole numbers times a float16 for each super-block."""

    group: int  # input features of a super-block
    bits: int
    signed: bool = False

    @property
    def zero_point(self) -> int:
        """What makes a sub-scale unsigned when it is added."""
        return 1 << (self.bits - 1) if self.signed else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How a matrix `[M, K]` is stored; names follow the field (GGUF types, wBITSaBITS schemes)."""

    name: str
    bits: int  # of a code as kernels multiply it: 32, 16, 8 or 4
    code_bits: int  # that a code needs: `bits`, or less
    float_dtype: str | None = None  # set for float formats only
    group: int = 0  # input features that share a scale; 0 = the whole row (affine formats only)
    scale_dtype: str = "float16"
    has_min: bool = False
    sub_scales: SubScales | None = None
    codebook: tuple[int, ...] | None = None  # codes are among these, and stored as indices
    float_codes: bool = False  # codes are e4m3 numbers

    @property
    def is_float(self) -> bool:
        """True for f32, bf16 and f16."""
        return self.float_dtype is not None

    @property
    def zero_point(self) -> int:
        """What is subtracted from a stored code: 4-bit symmetric codes are stored as 0…15."""
        return 8 if self.bits == 4 and not self.has_min else 0

    @property
    def code_dtype(self) -> str:
        """Of unpacked codes: 4-bit codes and codes above a minimum are unsigned."""
        if self.float_codes:
            return "float8_e4m3fn"
        return "uint8" if self.bits == 4 or self.has_min else "int8"

    @property
    def zero_code(self) -> int:
        """What is added to a code to store it unsigned in `code_bits`; 0 above a minimum."""
        if self.codebook is not None:
            return 128
        return 0 if self.has_min or self.is_float or self.float_codes else 1 << (self.code_bits - 1)

    @property
    def planes(self) -> tuple[int, ...]:
        """Parts of 4, 2 and 1 bits that a code is cut into where it fills no byte or half byte,
        the lowest bits first; one part otherwise.
        """
        return {3: (2, 1), 5: (4, 1), 6: (4, 2)}.get(self.code_bits, (self.code_bits,))

    @property
    def is_composed(self) -> bool:
        """Whether kernels have to put codes together from planes, or scales from sub-scales."""
        return self.planes != (self.bits,) or self.sub_scales is not None

    def num_groups(self, k: int) -> int:
        """Scales of a row of k input features; ValueError where the group does not divide k."""
        if self.group == 0:
            return 1
        if k % self.group:
            raise ValueError(f"{self.name}: group {self.group} does not divide {k} input features")
        return k // self.group


def _float(name: str, bits: int, dtype: str) -> WeightFormat:
    return WeightFormat(name=name, bits=bits, code_bits=bits, float_dtype=dtype)


def _affine(
    name: str, bits: int, group: int, scale: str = "float16", *, min: bool = False
) -> WeightFormat:
    """Codes of 4 bits are multiplied as such, all others as bytes."""
    return WeightFormat(
        name=name,
        bits=4 if bits == 4 else 8,
        code_bits=bits,
        group=group,
        scale_dtype=scale,
        has_min=min,
    )


def _book(name: str, group: int, values: tuple[int, ...]) -> WeightFormat:
    """Codes of four bits that stand for sixteen bytes."""
    return replace(_affine(name, 8, group), code_bits=4, codebook=values)


def _nested(
    name: str, bits: int, group: int, sub_bits: int, *, signed: bool = False, min: bool = False
) -> WeightFormat:
    """A K type of GGUF: super-blocks of 256."""
    sub_scales = SubScales(group=256, bits=sub_bits, signed=signed)
    return replace(_affine(name, bits, group, "float32", min=min), sub_scales=sub_scales)


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        _float("f32", 32, "float32"),
        _float("bf16", 16, "bfloat16"),
        _float("f16", 16, "float16"),
        _affine("w8", 8, 0, "float32"),
        replace(_affine("fp8", 8, 0, "float32"), float_codes=True),
        _affine("w4-g32", 4, 32),
        _affine("w4-g64", 4, 64),
        _affine("w4-g128", 4, 128),
        _affine("w4-g32-asym", 4, 32, min=True),
        _affine("w4-g64-asym", 4, 64, min=True),
        _affine("w4-g128-asym", 4, 128, min=True),
        # GGUF block formats, kept bit-exact.
        _affine("q4_0", 4, 32),
        _affine("q4_1", 4, 32, min=True),
        _affine("q5_0", 5, 32),
        _affine("q5_1", 5, 32, min=True),
        _affine("q8_0", 8, 32),
        _nested("q2_k", 2, 16, 4, min=True),
        _nested("q3_k", 3, 16, 6, signed=True),
        _nested("q4_k", 4, 32, 6, min=True),
        _nested("q5_k", 5, 32, 6, min=True),
        _nested("q6_k", 6, 16, 8, signed=True),
        _book(
            "iq4_nl",
            32,
            (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedScales:
    """What scales (or minimums) `[M, num_groups]` are products of.

    supers `[M, K / sub_scales.group]` float16; subs `[M, num_groups]` int8.
    """

    supers: npt.NDArray[np.float16]
    subs: npt.NDArray[np.int8]

    def products(self) -> npt.NDArray[np.float32]:
        """The scales `[M, num_groups]`, exact."""
        m, groups = self.subs.shape
        parts = self.subs.astype(np.float32).reshape(m, self.supers.shape[1], -1)
        return (self.supers.astype(np.float32)[:, :, None] * parts).reshape(m, groups)

    def take_rows(self, rows: npt.NDArray[np.intp] | slice) -> NestedScales:
        """Those of some rows, in this order."""
        return NestedScales(supers=self.supers[rows], subs=self.subs[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """A matrix in an affine format, rows in the model's order, not packed for any kernel.

    codes `[M, K]` in `format.code_dtype`, *before* the zero point is subtracted (4 bits: 0…15);
    scales `[M, num_groups]` and mins (same shape, or None) in `format.scale_dtype`. Where the
    format has sub-scales, nested_scales and nested_mins hold what these are products of.
    """

    format: WeightFormat
    codes: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic]
    mins: npt.NDArray[np.generic] | None
    nested_scales: NestedScales | None = None
    nested_mins: NestedScales | None = None

    @classmethod
    def of_nested(
        cls,
        format: WeightFormat,
        codes: npt.NDArray[np.generic],
        scales: NestedScales,
        mins: NestedScales | None,
    ) -> QuantizedMatrix:
        """A matrix in a format with sub-scales."""
        return cls(
            format=format,
            codes=codes,
            scales=scales.products(),
            mins=None if mins is None else mins.products(),
            nested_scales=scales,
            nested_mins=mins,
        )

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The values `[M, K]` float32."""
        m, k = self.codes.shape
        groups = self.scales.shape[1]
        codes = self.codes.astype(np.float32).reshape(m, groups, k // groups) - np.float32(
            self.format.zero_point
        )
        values = codes * self.scales.astype(np.float32)[:, :, None]
        if self.mins is not None:
            values += self.mins.astype(np.float32)[:, :, None]
        return values.reshape(m, k)

    def take_rows(self, rows: npt.NDArray[np.intp] | slice) -> QuantizedMatrix:
        """The same matrix with its rows in another order (or fewer of them)."""
        nested_scales, nested_mins = self.nested_scales, self.nested_mins
        return QuantizedMatrix(
            format=self.format,
            codes=self.codes[rows],
            scales=self.scales[rows],
            mins=None if self.mins is None else self.mins[rows],
            nested_scales=None if nested_scales is None else nested_scales.take_rows(rows),
            nested_mins=None if nested_mins is None else nested_mins.take_rows(rows),
        )


def concatenate(parts: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """The rows of matrices of one format, one matrix after the other."""
    if len(parts) == 1:
        return parts[0]
    mins = [part.mins for part in parts if part.mins is not None]
    return QuantizedMatrix(
        format=parts[0].format,
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        mins=np.concatenate(mins) if mins else None,
        nested_scales=_concatenate_nested([part.nested_scales for part in parts]),
        nested_mins=_concatenate_nested([part.nested_mins for part in parts]),
    )


def _concatenate_nested(parts: Sequence[NestedScales | None]) -> NestedScales | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return NestedScales(
        supers=np.concatenate([part.supers for part in present]),
        subs=np.concatenate([part.subs for part in present]),
    )
