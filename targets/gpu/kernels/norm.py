"""RMSNorm and LayerNorm: a block for each row.

RMSNorm: Zhang and Sennrich, 2019: y = x / sqrt(mean(x²) + eps) · (weight + offset). LayerNorm: Ba
et al., 2016, with the variance taken around the mean (a second pass over the row), not as a
difference of squares. Activations are of `dtype`, weights and biases of `vector_dtype`; all sums
are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import argument, f32, i64, kernel, put, registers, to_f32
from llmc.targets.gpu.kernels.block import add, launch, reduce, rows_of, strided
from llmc.targets.gpu.parameters import GpuParameters

Expr = Any


def rms_norm(
    *,
    features: int,
    eps: float,
    offset: float,
    heads: int | None,
    tokens: int | None,
    dtype: str,
    vector_dtype: str,
    params: GpuParameters,
) -> PrimFunc:
    """RMSNorm over the last axis; buffers x, weight `[features]`, y.

    x and y are `[1, T, features]`, or `[1, T, heads, features]` with `heads` (a norm of each head),
    both of `dtype`.
    """
    with kernel("rms_norm") as built:
        rows = rows_of(tokens)
        shape = (1, rows, features) if heads is None else (1, rows, heads, features)
        x = argument("x", shape, dtype)
        weight = argument("weight", (features,), vector_dtype)
        y = argument("y", shape, dtype)
        count = rows if heads is None else rows * i64(heads)
        with launch((count,), (params.row_threads(features),)) as (row, thread):

            def at(column: Expr) -> tuple[Expr, ...]:
                if heads is None:
                    return i64(0), row, column
                by = i64(heads)
                return i64(0), T.floordiv(row, by), T.floormod(row, by), column

            _normalize(
                lambda column: to_f32(x[at(column)]),
                weight,
                lambda column, value: put(y, value, *at(column)),
                features,
                eps,
                offset,
                thread,
                params,
            )
    return built.func


def add_rms_norm(
    *,
    features: int,
    eps: float,
    offset: float,
    tokens: int | None,
    dtype: str,
    vector_dtype: str,
    params: GpuParameters,
) -> PrimFunc:
    """Residual addition and RMSNorm; buffers x, residual, weight `[features]`, sum, y.

    x, residual, sum = x + residual and y are `[1, T, features]` of `dtype`.
    """
    with kernel("add_rms_norm") as built:
        rows = rows_of(tokens)
        shape = (1, rows, features)
        x = argument("x", shape, dtype)
        residual = argument("residual", shape, dtype)
        weight = argument("weight", (features,), vector_dtype)
        total = argument("sum", shape, dtype)
        y = argument("y", shape, dtype)
        with launch((rows,), (params.row_threads(features),)) as (row, thread):
            # A thread reads back only what it wrote itself: no barrier in between.
            with strided(thread, features, params.row_threads(features)) as column:
                at = (i64(0), row, column)
                put(total, to_f32(x[at]) + to_f32(residual[at]), *at)
            _normalize(
                lambda column: to_f32(total[i64(0), row, column]),
                weight,
                lambda column, value: put(y, value, 0, row, column),
                features,
                eps,
                offset,
                thread,
                params,
            )
    return built.func


def layer_norm(
    *,
    features: int,
    eps: float,
    tokens: int | None,
    dtype: str,
    vector_dtype: str,
    params: GpuParameters,
) -> PrimFunc:
    """LayerNorm over the last axis; buffers x, weight and bias `[features]`, y.

    x and y are `[1, T, features]` of `dtype`.
    """
    with kernel("layer_norm") as built:
        rows = rows_of(tokens)
        x = argument("x", (1, rows, features), dtype)
        weight = argument("weight", (features,), vector_dtype)
        bias = argument("bias", (features,), vector_dtype)
        y = argument("y", (1, rows, features), dtype)
        with launch((rows,), (params.row_threads(features),)) as (row, thread):

            def load(column: Expr) -> Expr:
                return to_f32(x[i64(0), row, column])

            mean = T.Bind(_mean(load, features, thread, params))
            variance = _mean(lambda c: _square(load(c) - mean), features, thread, params)
            scale = T.Bind(f32(1) / T.sqrt(variance + f32(eps)))
            with strided(thread, features, params.row_threads(features)) as column:
                value = (load(column) - mean) * scale * to_f32(weight[column]) + to_f32(
                    bias[column]
                )
                put(y, value, 0, row, column)
    return built.func


def _square(value: Expr) -> Expr:
    bound = T.Bind(value)
    return bound * bound


def _mean(load: Callable[[Expr], Expr], features: int, thread: Expr, params: GpuParameters) -> Expr:
    """The mean of load(0 … features - 1), known to every thread."""
    total = registers((1,))
    put(total, f32(0), 0)
    with strided(thread, features, params.row_threads(features)) as column:
        put(total, total[i64(0)] + load(column), 0)
    whole = reduce(total[i64(0)], add, thread, params.row_threads(features), params.features)
    return whole * f32(1 / features)


def _normalize(
    load: Callable[[Expr], Expr],
    weight: Expr,
    store: Callable[[Expr, Expr], None],
    features: int,
    eps: float,
    offset: float,
    thread: Expr,
    params: GpuParameters,
) -> None:
    """RMSNorm of one row."""
    mean = _mean(lambda c: _square(load(c)), features, thread, params)
    scale = T.Bind(f32(1) / T.sqrt(mean + f32(eps)))
    with strided(thread, features, params.row_threads(features)) as column:
        factor = to_f32(weight[column])
        factor = factor + f32(offset) if offset else factor
        store(column, load(column) * scale * factor)
