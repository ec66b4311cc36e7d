"""Weight formats: how one matrix is stored, as data that models, compiler and targets share.

A format is either a float type or *affine*: integer codes with a scale (and perhaps a minimum) per
group of consecutive input features,

    w[m, k] = code[m, k] · scale[m, k // group] + min[m, k // group]

with signed codes and no minimum where the format is symmetric. Every GGUF block format is affine in
this sense once its sub-scales are multiplied out in float32, which is exact (11-bit times at most
8-bit mantissas).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How a matrix `[M, K]` is stored; names follow the field (GGUF types, wBITSaBITS schemes)."""

    name: str
    bits: int  # stored bits a code: 32, 16, 8 or 4
    float_dtype: str | None = None  # set for float formats only
    group: int = 0  # input features that share a scale; 0 = the whole row (affine formats only)
    scale_dtype: str = "float16"
    has_min: bool = False

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
        return "uint8" if self.bits == 4 or self.has_min else "int8"

    def num_groups(self, k: int) -> int:
        """Scales of a row of k input features; ValueError where the group does not divide k."""
        if self.group == 0:
            return 1
        if k % self.group:
            raise ValueError(f"{self.name}: group {self.group} does not divide {k} input features")
        return k // self.group


def _affine(
    name: str, bits: int, group: int, scale: str = "float16", *, min: bool = False
) -> WeightFormat:
    return WeightFormat(name=name, bits=bits, group=group, scale_dtype=scale, has_min=min)


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat(name="f32", bits=32, float_dtype="float32"),
        WeightFormat(name="bf16", bits=16, float_dtype="bfloat16"),
        WeightFormat(name="f16", bits=16, float_dtype="float16"),
        _affine("w8", 8, 0, "float32"),
        _affine("w4-g32", 4, 32),
        _affine("w4-g64", 4, 64),
        _affine("w4-g128", 4, 128),
        _affine("w4-g32-asym", 4, 32, min=True),
        _affine("w4-g64-asym", 4, 64, min=True),
        _affine("w4-g128-asym", 4, 128, min=True),
        # GGUF block formats: codes kept bit-exact, sub-scales multiplied out.
        _affine("q4_0", 4, 32),
        _affine("q4_1", 4, 32, min=True),
        _affine("q5_0", 8, 32),
        _affine("q5_1", 8, 32, min=True),
        _affine("q8_0", 8, 32),
        _affine("q2_k", 4, 16, "float32", min=True),
        _affine("q3_k", 4, 16, "float32"),
        _affine("q4_k", 4, 32, "float32", min=True),
        _affine("q5_k", 8, 32, "float32", min=True),
        _affine("q6_k", 8, 16, "float32"),
        _affine("iq4_nl", 8, 32),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """A matrix in an affine format, rows in the model's order, not packed for any kernel.

    codes `[M, K]` in `format.code_dtype`, *before* the zero point is subtracted (4 bits: 0…15);
    scales `[M, num_groups]` and mins (same shape, or None) in `format.scale_dtype`.
    """

    format: WeightFormat
    codes: npt.NDArray[np.generic]
    scales: npt.NDArray[np.generic]
    mins: npt.NDArray[np.generic] | None

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

    def take_rows(self, rows: npt.NDArray[np.intp]) -> QuantizedMatrix:
        """The same matrix with its rows in another order (or fewer of them)."""
        return QuantizedMatrix(
            format=self.format,
            codes=self.codes[rows],
            scales=self.scales[rows],
            mins=None if self.mins is None else self.mins[rows],
        )


def concatenate(parts: list[QuantizedMatrix]) -> QuantizedMatrix:
    """The rows of matrices of one format, one matrix after the other."""
    if len(parts) == 1:
        return parts[0]
    mins = [part.mins for part in parts if part.mins is not None]
    return QuantizedMatrix(
        format=parts[0].format,
        codes=np.concatenate([part.codes for part in parts]),
        scales=np.concatenate([part.scales for part in parts]),
        mins=np.concatenate(mins) if mins else None,
    )
