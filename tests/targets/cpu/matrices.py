"""Random matrices in every weight format, with their exact values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tvm

from llmc.formats import FORMATS, NestedScales, QuantizedMatrix, WeightFormat

FLOAT_DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def storage(fmt: WeightFormat) -> tuple[Any, ...]:
    """All that a kernel sees of a format: equal for q4_0 and w4-g32, say."""
    storage = fmt.bits, fmt.code_bits, fmt.float_dtype, fmt.group, fmt.scale_dtype, fmt.has_min
    return *storage, fmt.sub_scales, fmt.codebook, fmt.float_codes


HOST = str(tvm.target.codegen.llvm_get_system_cpu())
"""LLVM's name of the CPU that runs the tests."""

DISTINCT = list({storage(f): f for f in FORMATS.values()}.values())
"""One format of each storage."""
ON_CPU = [fmt for fmt in DISTINCT if not fmt.float_codes]


def random_matrix(
    rng: np.random.Generator, fmt: WeightFormat, m: int, k: int
) -> tuple[Any, np.ndarray]:
    """A matrix as `pack` takes it, and its values `[m, k]` float64."""
    if fmt.float_dtype is not None:
        values = rng.standard_normal((m, k)).astype(FLOAT_DTYPES[fmt.float_dtype])
        return values, values.astype(np.float64)
    shape = (m, fmt.num_groups(k))
    first = -fmt.zero_code + fmt.zero_point
    codes = rng.integers(first, first + (1 << fmt.code_bits), (m, k)).astype(fmt.code_dtype)
    if fmt.codebook is not None:
        codes = rng.choice(np.array(fmt.codebook, fmt.code_dtype), (m, k))
    if fmt.float_codes:  # every number, the smallest too; 127 and 255 are no numbers
        bits = rng.integers(0, 127, (m, k)) + 128 * rng.integers(0, 2, (m, k))
        codes = bits.astype(np.uint8).view(fmt.code_dtype)
    if fmt.sub_scales is None:
        scales = rng.uniform(-0.03, 0.03, shape).astype(fmt.scale_dtype)
        mins = rng.uniform(-0.2, 0.1, shape).astype(fmt.scale_dtype) if fmt.has_min else None
        matrix = QuantizedMatrix(format=fmt, codes=codes, scales=scales, mins=mins)
    else:
        nested = _nested(rng, fmt, shape, k, 0.03)
        nested_mins = _nested(rng, fmt, shape, k, 0.2) if fmt.has_min else None
        matrix = QuantizedMatrix.of_nested(fmt, codes, nested, nested_mins)
    exact = (codes.astype(np.float64) - fmt.zero_point).reshape(*shape, -1)
    exact = exact * matrix.scales.astype(np.float64)[:, :, None]
    if matrix.mins is not None:
        exact += matrix.mins.astype(np.float64)[:, :, None]
    return matrix, exact.reshape(m, k)


def _nested(
    rng: np.random.Generator, fmt: WeightFormat, shape: tuple[int, int], k: int, largest: float
) -> NestedScales:
    """Scales or minimums of up to `largest`, of all sub-scales that the format can hold."""
    subs = fmt.sub_scales
    assert subs is not None
    supers = rng.uniform(-largest, largest, (shape[0], k // subs.group)) / (1 << subs.bits)
    first = -subs.zero_point
    return NestedScales(
        supers=supers.astype(np.float16),
        subs=rng.integers(first, first + (1 << subs.bits), shape).astype(np.int8),
    )


def build(functions: dict[str, tvm.tirx.PrimFunc], mcpu: str | None = None) -> Any:
    """One library of many kernels: each compilation has a fixed cost."""
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu or HOST})
    return tvm.compile(tvm.IRModule(named), target=target)


def tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """The array as a kernel's argument."""
    return tvm.runtime.tensor(array)
