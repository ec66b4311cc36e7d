"""y = x · Wᵀ (+ bias) (+ residual) with panel-packed weights of any format, for one token and for many.

Buffers in order: x `[1, T, K]` f32, the arrays of `packed_arrays(fmt, m, k)`, bias `[M]` f32 where asked,
residual `[1, T, M]` f32 where asked, y `[1, T, M]` f32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm
from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels.panels import (
    Registers,
    WeightPanels,
    argument,
    dot_panel,
    get,
    i64,
    k_block_words,
    lanes,
    prepare_activations,
    put,
    registers,
    scratch,
    size_var,
    splat,
    unpack_panel,
)
from llmc.targets.cpu.kernels.tiles import load_panel, multiply_tile, store_panel
from llmc.targets.cpu.layout import PANEL, ceildiv
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

    Raises CompileError where the format cannot hold k features.
    """
    assert tokens in (1, None), tokens
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = i64(1) if tokens == 1 else size_var("num_tokens")
            operands = _Operands(
                x=argument("x", (1, count, k)),
                weights=WeightPanels.arguments(fmt, m, k),
                bias=argument("bias", (m,)) if bias else None,
                residual=argument("residual", (1, count, m)) if residual else None,
                y=argument("y", (1, count, m)),
            )
            if tokens == 1:
                _one_token(operands, params)
            else:
                _many_tokens(operands, count, params)
    return builder.get()


@dataclass(frozen=True, slots=True)
class _Operands:
    x: Expr
    weights: WeightPanels
    bias: Expr | None
    residual: Expr | None
    y: Expr

    def start(self, token: Expr, index: Expr, zero: Expr) -> Expr:
        """What the sum at `y[0, token, index]` starts from."""
        value = zero if self.bias is None else self.bias[index]
        if self.residual is not None:
            added = self.residual[i64(0), token, index]
            value = added if self.bias is None else value + added
        return value


def _one_token(operands: _Operands, params: LinearParameters) -> None:
    weights = operands.weights
    x = prepare_activations(weights, operands.x, 1)
    serial = weights.m * weights.k <= params.serial_weights
    loop: Callable[[Expr], Any] = T.serial if serial else T.parallel
    sums = scratch((weights.panels, 5, PANEL))
    with loop(i64(weights.panels)) as panel:
        total = dot_panel(
            weights,
            i64(0),
            panel,
            x,
            i64(0),
            Registers(sums, panel),
            params.gemv_words,
            params.prefetch_words,
        )

        def store(index: Expr, value: Expr) -> None:
            zero = T.float32(0.0)
            if operands.bias is not None or operands.residual is not None:
                value = value + operands.start(i64(0), index, zero)
            T.buffer_store(operands.y, value, [i64(0), i64(0), index])

        store_panel(weights.m, panel * i64(PANEL), total, store)


def _many_tokens(operands: _Operands, num_tokens: Expr, params: LinearParameters) -> None:
    """Tasks are column blocks × row blocks, columns outermost: neighbours share weights.

    A task unpacks a block of its columns' weights into scratch that stays in cache and multiplies it with all
    of its rows, one block of features after the other; y holds the sums between blocks.
    """
    weights = operands.weights
    tile_panels = min(params.tile_panels, weights.panels)
    block_words = k_block_words(weights, params.k_block)
    block_features = block_words * weights.width
    num_blocks = ceildiv(weights.words, block_words)
    row_blocks = T.Bind(T.floordiv(num_tokens + i64(params.row_block - 1), i64(params.row_block)))
    column_blocks = ceildiv(weights.panels, tile_panels)
    with T.parallel(i64(column_blocks) * row_blocks) as task:
        first_panel = T.Bind(T.floordiv(task, row_blocks) * i64(tile_panels))
        first_row = T.Bind(T.floormod(task, row_blocks) * i64(params.row_block))
        num_rows = T.Bind(T.min(i64(params.row_block), num_tokens - first_row))
        acc = registers(max(params.token_tiles) * tile_panels)
        unpacked = scratch((block_features, tile_panels * PANEL))
        with T.serial(i64(num_blocks)) as block:
            _unpack(weights, first_panel, block, block_words, tile_panels, unpacked)
            start = T.Bind(block * i64(block_features))
            features = T.Bind(T.min(i64(block_features), i64(weights.k) - start))
            done: Expr = i64(0)
            for size in params.token_tiles:
                tiles = T.Bind(T.floordiv(num_rows - done, i64(size)))
                with T.serial(tiles) as tile:
                    token = T.Bind(first_row + done + tile * i64(size))
                    _tile(operands, token, size, first_panel, start, features, unpacked, acc, tile_panels)
                done = T.Bind(done + tiles * i64(size))


def _unpack(
    weights: WeightPanels,
    first_panel: Expr,
    block: Expr,
    block_words: int,
    tile_panels: int,
    unpacked: Expr,
) -> None:
    for p in range(tile_panels):
        panel = first_panel + i64(p)
        if weights.panels % tile_panels:
            # The last task's missing panels repeat its last one; their results are never stored.
            panel = T.min(panel, i64(weights.panels - 1))

        def store(feature: Expr, value: Expr, column: int = p * PANEL) -> None:
            T.buffer_store(unpacked, value, [feature, lanes(i64(column))])

        unpack_panel(weights, i64(0), T.Bind(panel), block, block_words, store)


def _tile(
    operands: _Operands,
    token: Expr,
    size: int,
    first_panel: Expr,
    start: Expr,
    features: Expr,
    unpacked: Expr,
    acc: Registers,
    tile_panels: int,
) -> None:
    """Adds one block of features to `size` tokens × `tile_panels` panels of y."""
    m, panels = operands.weights.m, operands.weights.panels

    def each(action: Callable[[int, Expr, Expr], None]) -> None:
        for p in range(tile_panels):
            column = (first_panel + i64(p)) * i64(PANEL)

            def all_rows(column: Expr = column, p: int = p) -> None:
                for r in range(size):
                    action(r * tile_panels + p, token + i64(r), column)

            if p and panels % tile_panels:
                with T.If(first_panel + i64(p) < i64(panels)), T.Then():
                    all_rows()
            else:
                all_rows()

    def load(index: int, row: Expr, column: Expr) -> None:
        load_panel(m, column, lambda at: operands.y[i64(0), row, at], acc, index)

    def begin(index: int, row: Expr, column: Expr) -> None:
        if operands.bias is None and operands.residual is None:
            put(acc, index, splat(0.0))
        else:
            load_panel(
                m, column, lambda at: operands.start(row, at, T.float32(0.0)), acc, index
            )

    def store(index: int, row: Expr, column: Expr) -> None:
        store_panel(
            m,
            column,
            get(acc, index),
            lambda at, value: T.buffer_store(operands.y, value, [i64(0), row, at]),
        )

    if panels % tile_panels:
        for index in range(size * tile_panels):
            put(acc, index, splat(0.0))
    with T.If(start == i64(0)):
        with T.Then():
            each(begin)
        with T.Else():
            each(load)

    def activation(row: int) -> Callable[[Expr], Expr]:
        return lambda k: operands.x[i64(0), token + i64(row), start + k]

    multiply_tile(acc, unpacked, features, [activation(r) for r in range(size)], tile_panels)
    each(store)
