"""What packing a weight is in every layout: which matrices are taken, and how stacks are filled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import ml_dtypes
import numpy as np

from llmc.errors import CompileError
from llmc.formats import QuantizedMatrix, WeightFormat
from llmc.targets.base import Array, Matrix, PackedPart

_FLOAT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class PartsOf(Protocol):
    """The arrays of a packed matrix `[m, k]`, or of a stack of `num_experts`."""

    def __call__(
        self, fmt: WeightFormat, m: int, k: int, *, num_experts: int | None = None
    ) -> list[PackedPart]:
        """Raises CompileError where the format cannot hold k input features."""


def pack(
    fmt: WeightFormat,
    matrices: Sequence[Matrix],
    *,
    stacked: bool,
    parts_of: PartsOf,
    values: Callable[[WeightFormat, Array], list[Array]],
    affine: Callable[[WeightFormat, QuantizedMatrix], list[Array]],
) -> list[Array]:
    """Packs one matrix `[M, K]`, or a stack of equal ones, into the arrays of `parts_of`.

    Float formats take dense arrays of any float type, which `values` gets rounded to the format's
    own; affine formats take a QuantizedMatrix, which `affine` gets. Both return the arrays of one
    matrix. Raises CompileError on a mismatch.
    """

    def one(matrix: Matrix) -> list[Array]:
        parts = parts_of(fmt, *_shape(matrix))
        if fmt.float_dtype is not None:
            arrays = values(fmt, _dense(fmt, matrix))
        else:
            arrays = affine(fmt, _affine(fmt, matrix))
        for part, array in zip(parts, arrays, strict=True):
            assert (array.shape, array.dtype.name) == (part.shape, part.dtype), (fmt.name, part)
        return arrays

    if not stacked:
        return one(matrices[0])
    if not matrices:
        raise CompileError("an empty stack of matrices cannot be packed")
    m, k = _shape(matrices[0])
    packed: list[Array] = [
        np.empty(part.shape, part.dtype) for part in parts_of(fmt, m, k, num_experts=len(matrices))
    ]
    for index, matrix in enumerate(matrices):
        if _shape(matrix) != (m, k):
            raise CompileError(
                f"matrix {index} of a stack of [{m}, {k}] has shape {_shape(matrix)}"
            )
        for target, array in zip(packed, one(matrix), strict=True):
            target[index] = array
    return packed


def check_shape(m: int, k: int) -> None:
    """Raises CompileError for a matrix without rows or features."""
    if m < 1 or k < 1:
        raise CompileError(f"a weight matrix has shape [{m}, {k}]; both have to be at least 1")


def num_groups(fmt: WeightFormat, k: int) -> int:
    """Scales of a row; raises CompileError where the format's groups do not divide k."""
    try:
        return fmt.num_groups(k)
    except ValueError as exc:
        raise CompileError(
            str(exc), hint="choose a format with a smaller group, or one float format"
        ) from exc


def _shape(matrix: Matrix) -> tuple[int, int]:
    m, k = matrix.codes.shape if isinstance(matrix, QuantizedMatrix) else matrix.shape
    return m, k


def _dense(fmt: WeightFormat, matrix: Matrix) -> Array:
    if isinstance(matrix, QuantizedMatrix):
        raise CompileError(f"{fmt.name}: got a matrix in {matrix.format.name}, expected values")
    assert fmt.float_dtype is not None
    return matrix.astype(_FLOAT_DTYPES[fmt.float_dtype], copy=False)


def _affine(fmt: WeightFormat, matrix: Matrix) -> QuantizedMatrix:
    if not isinstance(matrix, QuantizedMatrix) or matrix.format != fmt:
        found = matrix.format.name if isinstance(matrix, QuantizedMatrix) else "dense values"
        raise CompileError(f"{fmt.name}: got {found}, expected codes and scales of {fmt.name}")
    if fmt.has_min and matrix.mins is None:
        raise CompileError(f"{fmt.name}: the matrix has no minimums")
    return matrix
