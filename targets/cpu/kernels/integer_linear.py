"""y = x · Wᵀ (+ bias) (+ residual) in integers: quantized activations times quantized weights.

Or what a gated activation makes of y, for the product after it.

Buffers in order: codes `[1, T, K]` int8, scales `[1, T, K / block]` f32, sums `[1, T, K / unit]`
int32, the arrays of `packed_parts(fmt, m, k)`, bias
`[M]` f32 where asked, residual `[1, T, M]` f32 where asked, y `[1, T, M]` f32, or the output of
`gate`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.bfloat16_tiles import bfloat16_tiles
from llmc.targets.cpu.kernels.byte_tiles import byte_tiles
from llmc.targets.cpu.kernels.byte_tiles import takes as takes_bytes
from llmc.targets.cpu.kernels.code_tiles import code_tiles, takes
from llmc.targets.cpu.kernels.integer import (
    CodedRows,
    integer_panels,
    unit_of,
    unpacked_chunks,
)
from llmc.targets.cpu.kernels.nested_tiles import nested_tiles, takes_nested
from llmc.targets.cpu.kernels.outputs import Gated
from llmc.targets.cpu.kernels.register_tiles import Turn, multiply_tiles
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.parameters import FewTokens, IntegerParameters

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
    in_place: bool = False,
    params: IntegerParameters,
    gate: Callable[[Expr], Gated] | None = None,
) -> tvm.tirx.PrimFunc:
    """The product with a matrix `[m, k]` for exactly one token (`tokens=1`) or any number (None).

    `block` is what `activation_block` says; `gate` declares where a gated output of T rows goes,
    whose blocks divide M / 2. Raises CompileError where the format cannot hold k features.
    """
    assert tokens in (1, None), tokens
    params = params.of(fmt)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("integer_linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = i64(1) if tokens == 1 else size_var("num_tokens")
            codes = argument("codes", (1, count, k), "int8")
            scales = argument("scales", (1, count, k // block))
            sums = argument("sums", (1, count, k // unit_of(fmt, block)), "int32")
            product = Product.arguments(
                codes,
                fmt,
                m,
                k,
                bias=bias,
                residual=residual,
                in_place=in_place,
                table=params.table,
                gate=gate,
            )
            weights = product.weights
            coded = CodedRows(codes, scales, sums, block)

            def multiply(
                panels: list[Expr], rows: list[Expr], turn: Turn | None, following: Expr | None
            ) -> list[list[Expr]]:
                return integer_panels(weights, i64(0), panels, coded, rows, params, turn, following)

            def vectors() -> None:
                chunks = None
                if tokens is None and params.chunked is not None:
                    chunks = unpacked_chunks(weights, i64(0), coded, params)
                multiply_tiles(product, tokens, count, k, params.tiling, multiply, chunks)

            def many() -> None:
                tiles = params.byte_tiles
                in_bytes = tiles is not None and takes_bytes(fmt, k)
                if not in_bytes:
                    tiles = params.tiles
                if tiles is None:
                    vectors()
                    return
                with T.If(count > i64(tiles.crossover)):
                    with T.Then():
                        if in_bytes:
                            byte_tiles(product, coded, count, tiles)
                        else:
                            bfloat16_tiles(product, coded.bfloat16, count, tiles)
                    with T.Else():
                        vectors()

            def few(tiles: FewTokens, emit: Callable[[], None]) -> None:
                with T.If(tirx.And(count >= i64(tiles.first), count <= i64(tiles.last))):
                    with T.Then():
                        emit()
                    with T.Else():
                        many()

            nested = params.nested_tiles if takes_nested(fmt, block) else None
            codes_only = params.code_tiles if takes(fmt, block) else None
            with params.dot.scope():
                if tokens == 1:
                    vectors()
                elif nested is not None:
                    few(nested, partial(nested_tiles, product, coded, count, nested))
                elif codes_only is not None:
                    few(codes_only, partial(code_tiles, product, coded, count, codes_only))
                else:
                    many()
    return builder.get()
