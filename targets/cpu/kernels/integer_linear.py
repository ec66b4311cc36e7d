"""y = x · Wᵀ (+ bias) (+ residual) in integers: quantized activations times quantized weights.

Buffers in order: codes `[1, T, K]` int8, scales `[1, T, K / block]` f32, sums `[1, T, K / unit]`
int32, the arrays of `packed_arrays(fmt, m, k)`, bias
`[M]` f32 where asked, residual `[1, T, M]` f32 where asked, y `[1, T, M]` f32.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels.integer import CodedRows, integer_panels, unit_of
from llmc.targets.cpu.kernels.panels import (
    Rows,
    WeightPanels,
    argument,
    get,
    i64,
    lanes,
    registers,
    size_var,
)
from llmc.targets.cpu.kernels.tiles import Product, load_panel, store_panel
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import IntegerParameters

Expr = Any


def integer_linear(
    fmt: WeightFormat,
    m: int,
    k: int,
    tokens: int | None,
    *,
    block: int,
    bias: bool,
    residual: bool,
    params: IntegerParameters,
) -> tvm.tirx.PrimFunc:
    """The product with a matrix `[m, k]` for exactly one token (`tokens=1`) or any number (None).

    `block` is what `activation_block` says. Raises CompileError where the format cannot hold k
    features.
    """
    assert tokens in (1, None), tokens
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("integer_linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = i64(1) if tokens == 1 else size_var("num_tokens")
            codes = argument("codes", (1, count, k), "int8")
            scales = argument("scales", (1, count, k // block))
            sums = argument("sums", (1, count, k // unit_of(fmt, block)), "int32")
            weights = WeightPanels.arguments(fmt, m, k)
            biases = [argument("bias", (m,))] if bias else []
            residuals = [argument("residual", (1, count, m))] if residual else []
            y = argument("y", (1, count, m))

            def start(expert: Expr, row: Expr, index: Expr) -> Expr:
                values = [b[index] for b in biases] + [r[i64(0), row, index] for r in residuals]
                return sum(values[1:], start=values[0])

            product = Product(
                weights=weights,
                x=Rows(codes),
                y=Rows(y),
                x_row=lambda position: position,
                y_row=lambda position: position,
                start=start if bias or residual else None,
            )
            _multiply(product, CodedRows(codes, scales, sums, block), tokens, count, params)
    return builder.get()


def _multiply(
    product: Product, x: CodedRows, tokens: int | None, count: Expr, params: IntegerParameters
) -> None:
    """Tasks are row blocks × columns of a few panels; rows outermost, so that they stay cached."""
    weights = product.weights
    width = min(params.panels, weights.panels)
    columns = ceildiv(weights.panels, width)
    if tokens == 1:
        loop = T.serial if weights.m * weights.k <= params.serial_weights else T.parallel
        with loop(i64(columns)) as column:
            _column(product, x, column, width, i64(0), None, params)
        return
    largest = params.token_tiles[0]
    size = max(1, params.row_block_bytes // weights.k // largest) * largest
    row_blocks = T.Bind(T.floordiv(count + i64(size - 1), i64(size)))
    with T.parallel(i64(columns) * row_blocks) as task:
        first = T.Bind(T.floordiv(task, i64(columns)) * i64(size))
        rows = T.Bind(T.min(i64(size), count - first))
        _column(product, x, T.floormod(task, i64(columns)), width, first, rows, params)


def _column(
    product: Product,
    x: CodedRows,
    column: Expr,
    width: int,
    first: Expr,
    rows: Expr | None,
    params: IntegerParameters,
) -> None:
    """Rows first … first + rows - 1 (None: the one row) times `width` panels, or what is left."""
    panel = T.Bind(column * i64(width))
    rest = product.weights.panels % width

    def emit(num_panels: int) -> None:
        panels = [panel + i64(p) for p in range(num_panels)]
        if rows is None:
            _tile(product, x, panels, [first], params)
            return
        done: Expr = i64(0)
        for size in params.token_tiles:
            tiles = T.Bind(T.floordiv(rows - done, i64(size)))
            with T.serial(tiles) as tile:
                start = T.Bind(first + done + tile * i64(size))
                _tile(product, x, panels, [start + i64(r) for r in range(size)], params)
            done = T.Bind(done + tiles * i64(size))

    if not rest:
        emit(width)
        return
    with T.If(panel + i64(width) <= i64(product.weights.panels)):
        with T.Then():
            emit(width)
        with T.Else():
            emit(rest)


def _tile(
    product: Product,
    x: CodedRows,
    panels: list[Expr],
    rows: list[Expr],
    params: IntegerParameters,
) -> None:
    m = product.weights.m
    totals = integer_panels(product.weights, panels, x, rows, params)
    for p, panel in enumerate(panels):
        column = T.Bind(panel * i64(PANEL))
        for row, by_panel in zip(rows, totals, strict=True):
            value = by_panel[p]
            if product.start is not None:
                value = value + _start(product, m, row, column)
            store_panel(product, row, column, value)


def _start(product: Product, m: int, row: Expr, column: Expr) -> Expr:
    """What 16 outputs begin with: bias and residual."""
    assert product.start is not None
    if m % PANEL == 0:
        return product.start(i64(0), row, lanes(column))
    begin = registers(1)
    load_panel(m, column, lambda at: product.start(i64(0), row, at), begin, 0)
    return get(begin, 0)
