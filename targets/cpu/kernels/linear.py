"""y = x · Wᵀ (+ bias) (+ residual) with panel-packed weights of any format, for one token, a few or many.

Buffers in order: x `[1, T, K]` f32, the arrays of `packed_arrays(fmt, m, k)`, bias `[M]` f32 where asked,
residual `[1, T, M]` f32 where asked, y `[1, T, M]` f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels.panels import (
    Registers,
    WeightPanels,
    argument,
    dot_panel,
    i64,
    prepare_activations,
    scratch,
    size_var,
    sums_of,
)
from llmc.targets.cpu.kernels.tiles import (
    Product,
    multiply_columns,
    num_column_blocks,
    store_panel,
)
from llmc.targets.cpu.layout import PANEL
from llmc.targets.cpu.parameters import LinearParameters
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

Expr = Any


def linear(
    fmt: WeightFormat,
    m: int,
    k: int,
    tokens: int | None,
    *,
    bias: bool,
    residual: bool,
    params: LinearParameters,
) -> tvm.tirx.PrimFunc:
    """The product with a matrix `[m, k]` for exactly one token (`tokens=1`) or for any number (None).

    With `params.fused` any number is right, but a few are meant. Raises CompileError where the format cannot
    hold k features.
    """
    assert tokens in (1, None), tokens
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = i64(1) if tokens == 1 else size_var("num_tokens")
            x = argument("x", (1, count, k))
            weights = WeightPanels.arguments(fmt, m, k)
            added = [argument("bias", (m,))] if bias else []
            added_rows = [argument("residual", (1, count, m))] if residual else []
            y = argument("y", (1, count, m))

            def start(row: Expr, index: Expr) -> Expr:
                values = [b[index] for b in added] + [r[i64(0), row, index] for r in added_rows]
                return sum(values[1:], start=values[0])

            product = Product(
                weights=weights,
                x=x,
                y=y,
                x_row=lambda position: position,
                y_row=lambda position: position,
                start=start if bias or residual else None,
            )
            if tokens == 1:
                _fused(product, count, (1,), params)
            elif params.fused:
                _fused(product, count, params.token_tiles, params)
            else:
                _blocked(product, count, params)
    return builder.get()


def _fused(
    product: Product, num_tokens: Expr, tiles: tuple[int, ...], params: LinearParameters
) -> None:
    """A panel is read from memory once, and decoded in registers once for each tile of tokens."""
    weights = product.weights
    x = prepare_activations(weights, product.x, num_tokens)
    sums = scratch((weights.panels, max(sums_of(size)[1] for size in tiles), PANEL))
    serial = weights.m * weights.k <= params.serial_weights
    loop: Callable[[Expr], Any] = T.serial if serial else T.parallel
    with loop(i64(weights.panels)) as panel:
        registers = Registers(sums, panel)
        done: Expr = i64(0)
        for size in tiles:
            count = T.floordiv(num_tokens - done, i64(size))
            if tiles == (1,):
                _fused_tile(product, x, panel, [i64(0)], registers, params)
                break
            with T.serial(T.Bind(count)) as tile:
                first = T.Bind(done + tile * i64(size))
                rows = [first + i64(r) for r in range(size)]
                _fused_tile(product, x, panel, rows, registers, params)
            done = T.Bind(done + count * i64(size))


def _fused_tile(
    product: Product,
    x: Any,
    panel: Expr,
    rows: list[Expr],
    sums: Registers,
    params: LinearParameters,
) -> None:
    totals = dot_panel(product.weights, i64(0), panel, x, rows, sums, params)
    for row, total in zip(rows, totals, strict=True):

        def store(index: Expr, value: Expr, row: Expr = row) -> None:
            if product.start is not None:
                value = value + product.start(row, index)
            T.buffer_store(product.y, value, [i64(0), row, index])

        store_panel(product.weights.m, panel * i64(PANEL), total, store)


def _blocked(product: Product, num_tokens: Expr, params: LinearParameters) -> None:
    """Tasks are column blocks × row blocks, columns outermost: neighbours share weights."""
    size = i64(params.row_block)
    row_blocks = T.Bind(T.floordiv(num_tokens + size - i64(1), size))
    # An empty batch must not divide by zero.
    divisor = T.Bind(T.max(row_blocks, i64(1)))
    with T.parallel(i64(num_column_blocks(product.weights, params)) * row_blocks) as task:
        first = T.Bind(T.floormod(task, divisor) * size)
        count = T.Bind(T.min(size, num_tokens - first))
        column_block = T.floordiv(task, divisor)
        multiply_columns(product, i64(0), column_block, first, count, params)
