"""Random matrices in every weight format, with their exact values."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tvm

from llmc.formats import FORMATS, QuantizedMatrix, WeightFormat

FLOAT_DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


def storage(fmt: WeightFormat) -> tuple[Any, ...]:
    """All that a kernel sees of a format: equal for q4_0 and w4-g32, say."""
    return fmt.bits, fmt.float_dtype, fmt.group, fmt.scale_dtype, fmt.has_min


HOST = str(tvm.target.codegen.llvm_get_system_cpu())
"""LLVM's name of the CPU that runs the tests."""

DISTINCT = list({storage(f): f for f in FORMATS.values()}.values())
"""One format of each storage."""


def random_matrix(
    rng: np.random.Generator, fmt: WeightFormat, m: int, k: int
) -> tuple[Any, np.ndarray]:
    """A matrix as `pack` takes it, and its values `[m, k]` float64."""
    if fmt.float_dtype is not None:
        values = rng.standard_normal((m, k)).astype(FLOAT_DTYPES[fmt.float_dtype])
        return values, values.astype(np.float64)
    shape = (m, fmt.num_groups(k))
    low, high = (0, 1 << fmt.bits) if fmt.code_dtype == "uint8" else (-128, 128)
    scales = rng.uniform(-0.03, 0.03, shape).astype(fmt.scale_dtype)
    mins = rng.uniform(-0.2, 0.1, shape).astype(fmt.scale_dtype) if fmt.has_min else None
    codes = rng.integers(low, high, (m, k)).astype(fmt.code_dtype)
    matrix = QuantizedMatrix(format=fmt, codes=codes, scales=scales, mins=mins)
    exact = (codes.astype(np.float64) - fmt.zero_point).reshape(*shape, -1)
    exact = exact * scales.astype(np.float64)[:, :, None]
    if mins is not None:
        exact += mins.astype(np.float64)[:, :, None]
    return matrix, exact.reshape(m, k)


def build(functions: dict[str, tvm.tirx.PrimFunc], mcpu: str | None = None) -> Any:
    """One library of many kernels: each compilation has a fixed cost."""
    named = {name: f.with_attr("global_symbol", name) for name, f in functions.items()}
    target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu or HOST})
    return tvm.compile(tvm.IRModule(named), target=target)


def tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    """The array as a kernel's argument."""
    return tvm.runtime.tensor(array)
