"""y = x · Wᵀ (+ bias) (+ residual) with panel-packed weights of any format, for one token, a few or
many.

Buffers in order: x `[1, T, K]` f32, the arrays of `packed_parts(fmt, m, k)`, bias `[M]` f32 where
asked, residual `[1, T, M]` f32 where asked, y `[1, T, M]` f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.dot import prepare_activations
from llmc.targets.cpu.kernels.interleaved_rows import InterleavedRows
from llmc.targets.cpu.kernels.panels import Rows, WeightPanels
from llmc.targets.cpu.kernels.tiles import (
    Product,
    dot_tile,
    fused_positions,
    multiply_columns,
    num_column_blocks,
)
from llmc.targets.cpu.parameters import LinearParameters

Expr = Any


def linear(
    fmt: WeightFormat,
    m: int,
    k: int,
    tokens: int | None,
    *,
    bias: bool,
    residual: bool,
    in_place: bool = False,
    params: LinearParameters,
) -> tvm.tirx.PrimFunc:
    """The product with a matrix `[m, k]` for exactly one token (`tokens=1`) or for any number
    (None).

    With `params.fused` any number is right, but a few are meant. Raises CompileError where the
    format cannot hold k features.
    """
    assert tokens in (1, None), tokens
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = i64(1) if tokens == 1 else size_var("num_tokens")
            x = argument("x", (1, count, k))
            product = Product.arguments(
                x, fmt, m, k, bias=bias, residual=residual, in_place=in_place, table=params.table
            )
            if tokens == 1 or params.fused:
                _fused(product, tokens, count, params)
            else:
                _blocked(product, count, params)
    return builder.get()


def _fused(
    product: Product, tokens: int | None, num_tokens: Expr, params: LinearParameters
) -> None:
    """A panel is read from memory once, and decoded in registers once for each tile of tokens."""
    weights = product.weights
    x = prepare_activations(weights, product.x, num_tokens)
    serial = weights.m * weights.k <= params.serial_weights
    loop: Callable[[Expr], Any] = T.serial if serial else T.parallel
    with loop(i64(weights.panels)) as panel:
        if tokens == 1:
            dot_tile(product, x, i64(0), panel, [i64(0)], params)
        else:
            fused_positions(product, x, i64(0), panel, i64(0), num_tokens, params)


def _blocked(product: Product, num_tokens: Expr, params: LinearParameters) -> None:
    """Tasks are column blocks × row blocks, columns outermost: neighbours share weights."""
    size = i64(params.row_block)
    row_blocks = T.Bind(T.floordiv(num_tokens + size - i64(1), size))
    # An empty batch must not divide by zero.
    divisor = T.Bind(T.max(row_blocks, i64(1)))
    interleaved = None
    if params.interleaved:
        largest = params.token_tiles[0]
        interleaved = InterleavedRows.of(product.x, num_tokens, product.weights.k, largest)
    with T.parallel(i64(num_column_blocks(product.weights, params)) * row_blocks) as task:
        first = T.Bind(T.floormod(task, divisor) * size)
        count = T.Bind(T.min(size, num_tokens - first))
        column_block = T.floordiv(task, divisor)
        multiply_columns(product, i64(0), column_block, first, count, params, interleaved)
