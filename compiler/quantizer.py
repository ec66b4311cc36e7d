"""Round-to-nearest quantization: each group's scale (and minimum) is the one of least squared error
among several.

A scale from the largest magnitude spends the code range on outliers. Without a minimum, a group's
signed extreme `e` is divided by a row of divisors (the code it would get, fractional and beyond the
range to clip it). With one, the span from the smallest to the largest value is divided likewise,
and what is clipped is taken from the upper end, from the lower, or from both. The best candidate is
refined by least squares on its own codes, and every candidate is judged after it was rounded to the
scale's own type. The plain choice is among the candidates, so the result is never worse.

Errors may be weighed by input feature: with the mean square of the feature's activations it is the
error of the product that becomes small, not that of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
# An octave: what the steps of e4m3 are relative to.
_FLOAT_DIVISORS = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
_SPAN_DIVISORS = (15.0, 14.0, 14.5, 15.5, 16.0, 16.75, 17.5, 18.5, 20.0)
_CLIPPED_BELOW = (0.0, 0.5, 1.0)
"""Shares of what a span divisor clips that are taken from the lower end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values that each group of a matrix can take: `scale · code + min`.

    scales `[M, groups]` float32, mins the same or None; both hold numbers of the format's own
    scale type.
    """

    format: WeightFormat
    scales: Float32
    mins: Float32 | None

    def rows(self, chosen: slice) -> Grid:
        """The grid of some rows."""
        mins = None if self.mins is None else self.mins[chosen]
        return Grid(format=self.format, scales=self.scales[chosen], mins=mins)

    def nearest(self, grouped: Float32) -> Float32:
        """Nearest codes of values `[M, groups, group]`: whole numbers, signed where symmetric, or
        those of e4m3.
        """
        lowest, highest = code_range(self.format)
        inverse = np.divide(1, self.scales, out=np.zeros_like(self.scales), where=self.scales != 0)
        codes = grouped if self.mins is None else grouped - self.mins[:, :, None]
        codes = codes * inverse[:, :, None]
        if self.format.float_codes:
            np.clip(codes, lowest, highest, out=codes)
            return codes.astype(self.format.code_dtype).astype(np.float32)
        np.rint(codes, out=codes)
        return np.clip(codes, lowest, highest, out=codes)

    def values(self, codes: Float32) -> Float32:
        """What codes `[M, groups, group]` stand for."""
        values = codes * self.scales[:, :, None]
        if self.mins is not None:
            values += self.mins[:, :, None]
        return values

    def matrix(self, codes: Float32) -> QuantizedMatrix:
        """The stored form of codes `[M, K]` as `nearest` gives them."""
        fmt = self.format
        return QuantizedMatrix(
            format=fmt,
            codes=(codes + fmt.zero_point).astype(fmt.code_dtype),
            scales=self.scales.astype(fmt.scale_dtype),
            mins=None if self.mins is None else self.mins.astype(fmt.scale_dtype),
        )


def code_range(fmt: WeightFormat) -> tuple[int, int]:
    """Smallest and largest code, before a zero point is added."""
    if fmt.float_codes:
        return -448, 448
    if fmt.has_min:
        return 0, (1 << fmt.bits) - 1
    return -(1 << (fmt.bits - 1)), (1 << (fmt.bits - 1)) - 1


def quantize(
    values: Float32, fmt: WeightFormat, importance: Float32 | None = None
) -> QuantizedMatrix:
    """The matrix `[M, K]` float32 in an affine format, for the least squared error in each group.

    importance `[K]` weighs the squared errors of each input feature. Scales may be negative where
    there is no minimum: the extreme of a group takes the one code more that lies below zero. Raises
    UnsupportedError for float formats, for those that only GGUF files hold and for 8 bits with a
    minimum, CompileError where the group does not divide K or a value is not finite or too large
    for the scale type.
    """
    grid = fit_grid(values, fmt, importance)
    m, k = values.shape
    codes = np.empty((m, k), fmt.code_dtype)
    for rows in _blocks(m, k):
        part = grid.rows(rows)
        block = np.ascontiguousarray(values[rows], np.float32).reshape(*part.scales.shape, -1)
        codes[rows] = part.matrix(part.nearest(block).reshape(-1, k)).codes
    whole = grid.matrix(np.zeros((0, k), np.float32))
    return QuantizedMatrix(format=fmt, codes=codes, scales=whole.scales, mins=whole.mins)


def fit_grid(values: Float32, fmt: WeightFormat, importance: Float32 | None = None) -> Grid:
    """The grid of `quantize`, which see."""
    if (
        fmt.is_float
        or fmt.sub_scales
        or fmt.bits != fmt.code_bits
        or (fmt.has_min and fmt.bits != 4)
    ):
        raise UnsupportedError(
            f"no quantizer for format {fmt.name!r}",
            hint="choose a scheme of w8 or w4 weights, such as w8a16 or w4a16-g128",
        )
    m, k = values.shape
    try:
        groups = fmt.num_groups(k)
    except ValueError as exc:
        raise CompileError(
            str(exc), hint="choose a smaller group, or w8, whose scale covers a whole row"
        ) from exc
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32).reshape(1, groups, k // groups)
    scales = np.empty((m, groups), np.float32)
    mins = np.empty((m, groups), np.float32) if fmt.has_min else None
    for rows in _blocks(m, k):
        block = np.ascontiguousarray(values[rows], np.float32).reshape(-1, groups, k // groups)
        grid = _fit_groups(block, fmt, weights)
        scales[rows] = grid.scales
        if mins is not None and grid.mins is not None:
            mins[rows] = grid.mins
    return Grid(format=fmt, scales=scales, mins=mins)


def _blocks(m: int, k: int) -> Iterator[slice]:
    step = max(1, _BLOCK_WEIGHTS // k)
    for start in range(0, m, step):
        yield slice(start, min(m, start + step))


def _fit_groups(values: Float32, fmt: WeightFormat, weights: Float32 | None) -> Grid:
    """The best grid for values `[R, groups, group]`; weights are `[1, groups, group]`."""
    best: Grid | None = None
    least = np.empty(0, np.float32)
    for candidate in _candidates(values, fmt):
        error = _squared_error(values, candidate, weights)
        if best is None:
            best, least = candidate, error
        else:
            _take_better(best, least, candidate, error)
    assert best is not None
    fitted = _least_squares(values, best, weights)
    _take_better(best, least, fitted, _squared_error(values, fitted, weights))
    return best


def _take_better(best: Grid, least: Float32, candidate: Grid, error: Float32) -> None:
    """Puts the candidate's groups into `best` and their errors into `least` where smaller."""
    better = error < least
    least[better] = error[better]
    best.scales[better] = candidate.scales[better]
    if best.mins is not None and candidate.mins is not None:
        best.mins[better] = candidate.mins[better]


def _candidates(values: Float32, fmt: WeightFormat) -> Iterator[Grid]:
    if fmt.has_min:
        low, high = values.min(axis=2), values.max(axis=2)
        _check_finite(low, high)
        span = high - low
        for divisor in _SPAN_DIVISORS:
            scale = _rounded(span / np.float32(divisor), fmt)
            clipped = span - scale * np.float32(code_range(fmt)[1])
            for share in _CLIPPED_BELOW:
                minimum = _rounded(low + clipped * np.float32(share), fmt)
                yield Grid(format=fmt, scales=scale.copy(), mins=minimum)
        return
    at = np.abs(values).argmax(axis=2)
    extreme = np.take_along_axis(values, at[:, :, None], axis=2)[:, :, 0]
    _check_finite(extreme)
    for divisor in _FLOAT_DIVISORS if fmt.float_codes else _DIVISORS[fmt.bits]:
        yield Grid(format=fmt, scales=_rounded(-extreme / np.float32(divisor), fmt), mins=None)


def _check_finite(*extremes: Float32) -> None:
    if not all(np.isfinite(e).all() for e in extremes):
        raise CompileError("a weight is not finite", hint="the checkpoint is damaged")


def _least_squares(values: Float32, grid: Grid, weights: Float32 | None) -> Grid:
    """The grid of least squared error for the codes that `grid` gives."""
    codes = grid.nearest(values)
    ones = np.ones((1, *values.shape[1:]), np.float32) if weights is None else weights
    cc = np.einsum("rgk,rgk,xgk->rg", codes, codes, ones)
    vc = np.einsum("rgk,rgk,xgk->rg", values, codes, ones)
    if grid.mins is None:
        scale = vc / np.where(cc > 0, cc, 1)
        return Grid(format=grid.format, scales=_rounded(scale, grid.format), mins=None)
    n = ones.sum(axis=2)
    c = np.einsum("rgk,xgk->rg", codes, ones)
    v = np.einsum("rgk,xgk->rg", values, ones)
    determinant = n * cc - c * c
    solvable = determinant > np.float32(1e-6) * n * cc  # else all codes are the same
    scale = np.where(solvable, (n * vc - c * v) / np.where(solvable, determinant, 1), grid.scales)
    scale = _rounded(scale, grid.format)
    minimum = (v - scale * c) / np.where(n > 0, n, 1)
    return Grid(format=grid.format, scales=scale, mins=_rounded(minimum, grid.format))


def _rounded(numbers: Float32, fmt: WeightFormat) -> Float32:
    """Scales or minimums as their type stores them."""
    with np.errstate(over="ignore"):
        rounded = numbers.astype(fmt.scale_dtype).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise CompileError(
            f"{fmt.name}: a scale of {np.abs(numbers).max():.4g} does not fit {fmt.scale_dtype}",
            hint="choose w8a16, whose scales are float32",
        )
    return rounded


def _squared_error(values: Float32, grid: Grid, weights: Float32 | None) -> Float32:
    difference = grid.values(grid.nearest(values))
    difference -= values
    np.square(difference, out=difference)
    if weights is not None:
        difference *= weights
    error: Float32 = difference.sum(axis=2)
    return error
