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

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from llmc.compiler.quantizer_kernels import Codes, kernels
from llmc.errors import CompileError, UnsupportedError
from llmc.formats import QuantizedMatrix, WeightFormat

Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]

_BLOCK_WEIGHTS = 1 << 18
"""Weights that a thread quantizes at a time: the temporaries stay in its core's cache."""

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

    @classmethod
    def empty(cls, fmt: WeightFormat, m: int, k: int) -> Grid:
        """One to be filled, for a matrix `[m, k]`: in a file, since those of a large model together
        are more than memory should hold. CompileError where the format's groups do not divide k.
        """

        def array() -> Float32:
            with TemporaryFile(prefix="llmc-grid-") as file:
                return np.memmap(file, np.float32, "w+", shape=(m, _num_groups(fmt, k)))

        return cls(format=fmt, scales=array(), mins=array() if fmt.has_min else None)

    def copy_from(self, matrix: QuantizedMatrix) -> None:
        """Takes what a matrix was rounded to."""
        self.scales[:] = matrix.scales
        if self.mins is not None and matrix.mins is not None:
            self.mins[:] = matrix.mins

    def take_rows(self, rows: slice) -> Grid:
        """That of some rows."""
        mins = None if self.mins is None else self.mins[rows]
        return replace(self, scales=self.scales[rows], mins=mins)

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
    values: Array, fmt: WeightFormat, importance: Float32 | None = None
) -> QuantizedMatrix:
    """The matrix `[M, K]` of floats in an affine format, for the least squared error in each group.

    importance `[K]` weighs the squared errors of each input feature. Scales may be negative where
    there is no minimum: the extreme of a group takes the one code more that lies below zero. Raises
    UnsupportedError for float formats, for those that only GGUF files hold and for 8 bits with a
    minimum, CompileError where the group does not divide K or a value is not finite or too large
    for the scale type.
    """
    codes = np.empty(values.shape, fmt.code_dtype)

    def store(rows: slice, groups: Float32, scales: Float32, mins: Float32) -> None:
        found = np.empty(groups.shape, _codes(fmt).dtype)
        _run("nearest", fmt, groups, _evenly(groups), scales, mins, found)
        codes[rows] = found.reshape(-1, values.shape[1])

    whole = _fit(values, fmt, importance, store).matrix(np.zeros((0, 0), np.float32))
    return replace(whole, codes=codes)


def quantized_values(values: Array, grid: Grid) -> Float32:
    """The nearest values on the grid to those of a matrix `[M, K]`."""
    m, k = values.shape
    out = np.empty((m, k), np.float32)

    def fill(rows: slice) -> None:
        groups = _float32(values[rows]).reshape(-1, k // grid.scales.shape[1])
        scales = _float32(grid.scales[rows].ravel())
        mins = np.zeros_like(scales) if grid.mins is None else _float32(grid.mins[rows].ravel())
        into = out[rows].reshape(groups.shape)
        _run("values", grid.format, groups, _evenly(groups), scales, mins, into)

    for_blocks((m, k), fill)
    return out


def fit_grid(values: Array, fmt: WeightFormat, importance: Float32 | None = None) -> Grid:
    """The grid of `quantize`, which see."""
    return _fit(values, fmt, importance, lambda *_: None)


def _fit(
    values: Array,
    fmt: WeightFormat,
    importance: Float32 | None,
    each: Callable[[slice, Float32, Float32, Float32], None],
) -> Grid:
    """`each` gets blocks of rows in float32: (rows, groups `[N, n]`, scales `[N]`, mins `[N]`)."""
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
    groups = _num_groups(fmt, k)
    if importance is None:
        weights = np.ones((1, k // groups), np.float32)
    else:
        weights = _float32(importance).reshape(groups, k // groups)
    scales = np.empty((m, groups), np.float32)
    mins = np.empty((m, groups), np.float32) if fmt.has_min else None

    def fit_rows(rows: slice) -> None:
        block = _float32(values[rows]).reshape(-1, k // groups)
        scale, minimum = _fit_groups(block, fmt, weights)
        each(rows, block, scale, minimum)
        scales[rows] = scale.reshape(-1, groups)
        if mins is not None:
            mins[rows] = minimum.reshape(-1, groups)

    for_blocks((m, k), fit_rows)
    return Grid(format=fmt, scales=scales, mins=mins)


def _num_groups(fmt: WeightFormat, k: int) -> int:
    try:
        return fmt.num_groups(k)
    except ValueError as exc:
        raise CompileError(
            str(exc), hint="choose a smaller group, or w8, whose scale covers a whole row"
        ) from exc


def for_blocks(shape: tuple[int, int], body: Callable[[slice], None], multiple: int = 1) -> None:
    """`body` on blocks of rows, by as many threads as there are cores.

    Blocks start at multiples of so many rows.
    """
    m, k = shape
    if m * k <= 2 * _BLOCK_WEIGHTS:
        body(slice(0, m))
        return
    step = max(1, _BLOCK_WEIGHTS // k // multiple) * multiple
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(body, (slice(start, min(m, start + step)) for start in range(0, m, step))))


def _float32(values: Array) -> Float32:
    """In one piece, and writable: kernels take no other arrays."""
    return np.require(values, np.float32, ["C", "W"])


def _evenly(groups: Float32) -> Float32:
    """What weighs the errors of groups `[N, n]` alike."""
    return np.ones((1, groups.shape[1]), np.float32)


def _run(name: str, fmt: WeightFormat, *arrays: Array) -> None:
    """Calls one of quantizer_kernels."""
    kernels(_codes(fmt))[name](*(tvm_ffi.from_dlpack(array) for array in arrays))


def _codes(fmt: WeightFormat) -> Codes:
    lowest, highest = code_range(fmt)
    return Codes(
        lowest=lowest,
        highest=highest,
        e4m3=fmt.float_codes,
        zero_point=fmt.zero_point,
        dtype="float32" if fmt.float_codes else fmt.code_dtype,
    )


def _fit_groups(values: Float32, fmt: WeightFormat, weights: Float32) -> tuple[Float32, Float32]:
    """The best (scales, mins) `[N]` for groups `[N, n]`; weights `[G, n]` repeat along N."""
    scales, mins = _candidates(values, fmt)
    errors = _squared_errors(values, fmt, weights, scales, mins)
    each, best = np.arange(len(values)), errors.argmin(axis=1)
    scale, minimum, least = (np.ascontiguousarray(a[each, best]) for a in (scales, mins, errors))
    fitted = _least_squares(values, fmt, weights, scale, minimum)
    error = _squared_errors(values, fmt, weights, *(f[:, None] for f in fitted))[:, 0]
    better = error < least
    return np.where(better, fitted[0], scale), np.where(better, fitted[1], minimum)


def _squared_errors(
    values: Float32, fmt: WeightFormat, weights: Float32, scales: Float32, mins: Float32
) -> Float32:
    """`[N, C]` for candidates `[N, C]`."""
    errors = np.empty(scales.shape, np.float32)
    _run("errors", fmt, values, weights, _float32(scales), _float32(mins), errors)
    return errors


def _candidates(values: Float32, fmt: WeightFormat) -> tuple[Float32, Float32]:
    """(scales, mins) `[N, C]` to choose from for groups `[N, n]`."""
    low, high = _extremes(values, fmt)
    if fmt.has_min:
        span = high - low
        scales = _rounded(np.divide(span, np.array(_SPAN_DIVISORS, np.float32)), fmt)
        clipped = (span - scales * np.float32(code_range(fmt)[1]))[:, :, None]
        mins = _rounded(low[:, :, None] + clipped * np.array(_CLIPPED_BELOW, np.float32), fmt)
        return np.repeat(scales, len(_CLIPPED_BELOW), axis=1), mins.reshape(len(values), -1)
    extreme: Float32 = np.where(high > -low, high, low)
    divisors = _FLOAT_DIVISORS if fmt.float_codes else _DIVISORS[fmt.bits]
    scales = _rounded(np.divide(-extreme, np.array(divisors, np.float32)), fmt)
    return scales, np.zeros_like(scales)


def _extremes(values: Float32, fmt: WeightFormat) -> tuple[Float32, Float32]:
    """(least, largest) `[N, 1]` of groups `[N, n]`."""
    found = np.empty((3, len(values)), np.float32)
    _run("extremes", fmt, values, _evenly(values), found)
    if found[2].any():
        raise CompileError("a weight is not finite", hint="the checkpoint is damaged")
    return -found[1][:, None], found[0][:, None]


def _least_squares(
    values: Float32, fmt: WeightFormat, weights: Float32, scales: Float32, mins: Float32
) -> tuple[Float32, Float32]:
    """(scales, mins) of least squared error for the codes that `scales` and `mins` give."""
    moments = np.empty((4, len(values)), np.float32)
    _run("moments", fmt, values, weights, scales, mins, moments)
    cc, vc, c, v = moments
    if not fmt.has_min:
        return _rounded(vc / np.where(cc > 0, cc, np.float32(1)), fmt), mins
    n = np.resize(weights.sum(axis=1), len(values))
    determinant = n * cc - c * c
    solvable = determinant > np.float32(1e-6) * n * cc  # else all codes are the same
    scale = np.where(
        solvable, (n * vc - c * v) / np.where(solvable, determinant, np.float32(1)), scales
    )
    scale = _rounded(scale, fmt)
    return scale, _rounded((v - scale * c) / np.where(n > 0, n, np.float32(1)), fmt)


def _rounded(numbers: npt.NDArray[np.floating[Any]], fmt: WeightFormat) -> Float32:
    """Scales or minimums as their type stores them."""
    with np.errstate(over="ignore"):
        rounded = numbers.astype(fmt.scale_dtype).astype(np.float32)
    if not np.isfinite(rounded).all():
        raise CompileError(
            f"{fmt.name}: a scale of {np.abs(numbers).max():.4g} does not fit {fmt.scale_dtype}",
            hint="choose w8a16, whose scales are float32",
        )
    return rounded
