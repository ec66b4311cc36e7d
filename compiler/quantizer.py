"""Round-to-nearest quantization: each group's scale is the one of least squared error among
several.

A scale from the largest magnitude spends the code range on outliers. Here a group's signed extreme
`e` is divided by a row of divisors (the code it would get, fractional and beyond the range to clip
it), the best quotient is refined once by least squares, `scale = Σ value·code / Σ code²`, and every
candidate is judged after it was rounded to the scale's own type. The plain choice is among the
candidates, so the result is never worse.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmc.errors import CompileError, UnsupportedError
from llmc.formats import QuantizedMatrix, WeightFormat

Float32 = npt.NDArray[np.float32]

_BLOCK_WEIGHTS = 1 << 18
"""Weights quantized at a time: the temporaries stay in a core's cache."""

# The first of each is the plain choice; smaller ones make already quantized groups exact.
_DIVISORS = {
    4: (7.0, 8.0, 5.0, 6.0, 6.5, 7.25, 7.5, 7.75, 8.25, 8.5, 8.75, 9.0, 9.5, 10.0, 11.0, 12.0),
    8: (127.0, 128.0, 129.5, 132.0, 136.0, 141.0, 149.0, 159.0),
}


def quantize(values: Float32, fmt: WeightFormat) -> QuantizedMatrix:
    """The matrix `[M, K]` float32 in a symmetric affine format, for the least squared error in each
    group.

    Scales may be negative: the extreme of a group takes the one code more that lies below zero.
    Raises UnsupportedError for formats with a minimum and float formats, CompileError where the
    group does not divide K or a value is not finite or too large for the scale type.
    """
    if fmt.is_float or fmt.has_min:
        raise UnsupportedError(
            f"no quantizer for format {fmt.name!r}",
            hint="choose a symmetric format such as w8 or w4-g128",
        )
    m, k = values.shape
    try:
        groups = fmt.num_groups(k)
    except ValueError as exc:
        raise CompileError(
            str(exc), hint="choose a smaller group, or w8, whose scale covers a whole row"
        ) from exc
    codes = np.empty((m, k), fmt.code_dtype)
    scales = np.empty((m, groups), fmt.scale_dtype)
    step = max(1, _BLOCK_WEIGHTS // k)
    for start in range(0, m, step):
        rows = slice(start, min(m, start + step))
        block = np.ascontiguousarray(values[rows], np.float32).reshape(-1, k // groups)
        block_codes, block_scales = _quantize_groups(block, fmt)
        codes[rows] = (block_codes + fmt.zero_point).reshape(-1, k)
        scales[rows] = block_scales.reshape(-1, groups)
    return QuantizedMatrix(format=fmt, codes=codes, scales=scales, mins=None)


def _quantize_groups(values: Float32, fmt: WeightFormat) -> tuple[Float32, npt.NDArray[np.generic]]:
    """Signed codes `[R, group]` (whole numbers) and scales `[R]` in the scale type, of R groups."""
    limit = 1 << (fmt.bits - 1)
    at = np.abs(values).argmax(axis=1)
    extreme = np.take_along_axis(values, at[:, None], axis=1)[:, 0]
    if not np.isfinite(extreme).all():
        raise CompileError("a weight is not finite", hint="the checkpoint is damaged")

    best_error = np.full(len(values), np.inf, np.float32)
    best_scale = np.zeros(len(values), np.float32)

    def judge(scale: Float32) -> None:
        error = _squared_error(values, scale, limit)
        better = error < best_error
        best_error[better] = error[better]
        best_scale[better] = scale[better]

    for divisor in _DIVISORS[fmt.bits]:
        judge(_rounded(-extreme / np.float32(divisor), fmt))
    codes = _codes(values, best_scale, limit)
    norm = np.einsum("rk,rk->r", codes, codes)
    fitted = np.einsum("rk,rk->r", values, codes) / np.where(norm > 0, norm, 1)
    judge(_rounded(fitted, fmt))
    return _codes(values, best_scale, limit), best_scale.astype(fmt.scale_dtype)


def _rounded(scale: Float32, fmt: WeightFormat) -> Float32:
    """The scale as its type stores it."""
    with np.errstate(over="ignore"):
        rounded = scale.astype(fmt.scale_dtype).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise CompileError(
            f"{fmt.name}: a scale of {np.abs(scale).max():.4g} does not fit {fmt.scale_dtype}",
            hint="choose w8, whose scales are float32",
        )
    return rounded


def _codes(values: Float32, scale: Float32, limit: int) -> Float32:
    """Nearest codes in -limit … limit - 1, still as float32; zero where the scale is."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = values * inverse[:, None]
    np.rint(codes, out=codes)
    return np.clip(codes, -limit, limit - 1, out=codes)


def _squared_error(values: Float32, scale: Float32, limit: int) -> Float32:
    codes = _codes(values, scale, limit)
    codes *= scale[:, None]
    codes -= values
    error: Float32 = np.einsum("rk,rk->r", codes, codes)
    return error
