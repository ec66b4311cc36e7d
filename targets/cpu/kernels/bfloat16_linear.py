"""y = x · Wᵀ (+ bias) (+ residual) of bfloat16 numbers, two products an instruction and lane.

Buffers in order: x `[1, T, K]` bfloat16 (as uint16), the values of a bf16 matrix as `packed_parts`
says, bias `[M]` f32 where asked, residual `[1, T, M]` f32 where asked, y `[1, T, M]` f32,
or the output of `gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import FORMATS
from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.bfloat16 import dot, from_float32, with_dot
from llmc.targets.cpu.kernels.bfloat16_few import bfloat16_few
from llmc.targets.cpu.kernels.bfloat16_tiles import bfloat16_tiles, tile_depth
from llmc.targets.cpu.kernels.dot import sum_pairwise
from llmc.targets.cpu.kernels.outputs import Gated
from llmc.targets.cpu.kernels.panels import (
    WeightPanels,
    for_each_row,
    get,
    lanes,
    prefetch,
    put,
    registers,
    splat,
)
from llmc.targets.cpu.kernels.register_tiles import Add, Chunks, Turn, multiply_tiles
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import Bfloat16Parameters

Expr = Any
_MIN_DEPTH = 16  # features of a step below which matrix registers are mostly empty


def bfloat16_linear(
    m: int,
    k: int,
    tokens: int | None,
    *,
    bias: bool,
    residual: bool,
    in_place: bool = False,
    params: Bfloat16Parameters,
    gate: Callable[[Expr], Gated] | None = None,
) -> tvm.tirx.PrimFunc:
    """The product with a matrix `[m, k]`, k even, for exactly one token (`tokens=1`) or any number.

    Products are exact, sums float32; denormal numbers count as zero. `gate` is integer_linear's.
    """
    assert tokens in (1, None), tokens
    assert k % 2 == 0, k
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("bfloat16_linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = i64(1) if tokens == 1 else size_var("num_tokens")
            x = argument("x", (1, count, k), "uint16")
            product = Product.arguments(
                x, FORMATS["bf16"], m, k, bias=bias, residual=residual, in_place=in_place, gate=gate
            )
            weights = product.weights

            def multiply(
                panels: list[Expr], rows: list[Expr], turn: Turn | None, following: Expr | None
            ) -> list[list[Expr]]:
                return _tile(weights, panels, x, rows, params, turn, following)

            def values(row: Expr, first: Expr) -> Expr:
                return x[i64(0), row, lanes(first)]

            def vectors() -> None:
                # Where there are matrix registers a few rows are left.
                chunks = None if tokens == 1 or few is not None else _chunks(weights, x, params)
                features = k if chunks is None else k // chunks.count
                multiply_tiles(
                    product, tokens, count, 2 * features, params.tiling, multiply, chunks
                )

            tiles, few = params.tiles, params.few_tiles
            if tokens == 1 or tile_depth(k) < _MIN_DEPTH:
                tiles = few = None

            def up_to_sixteen() -> None:
                if few is None:
                    vectors()
                    return
                with T.If(count >= i64(few.first)):
                    with T.Then():
                        bfloat16_few(product, values, count, few)
                    with T.Else():
                        vectors()

            with with_dot():
                if tiles is None:
                    up_to_sixteen()
                else:
                    with T.If(count > i64(tiles.crossover)):
                        with T.Then():
                            bfloat16_tiles(product, values, count, tiles)
                        with T.Else():
                            up_to_sixteen()
    return builder.get()


def _chunks(weights: WeightPanels, x: Expr, params: Bfloat16Parameters) -> Chunks | None:
    """How rows are multiplied that are too long for many of them to stay in the cache."""
    least = ceildiv(weights.k, params.chunk)
    count = next((c for c in range(least, 2 * least + 1) if weights.words % c == 0), 1)
    if count == 1:
        return None

    def add(
        panels: list[Expr],
        chunk: Expr,
        rows: list[Expr],
        turn: Turn | None,
        before: list[list[Expr]],
    ) -> list[list[Expr]]:
        return _tile(weights, panels, x, rows, params, turn, None, (chunk, count, before))

    def of(panels: list[Expr]) -> Callable[[Expr], Add]:
        return lambda chunk: partial(add, panels, chunk)

    rows = params.tiling.row_block_bytes // (2 * weights.k // count)
    return Chunks(params.tiling, rows, count, of)


def _tile(
    weights: WeightPanels,
    panels: Sequence[Expr],
    x: Expr,
    rows: Sequence[Expr],
    params: Bfloat16Parameters,
    turn: Turn | None,
    following: Expr | None,
    part: tuple[Expr, int, list[list[Expr]]] | None = None,
) -> list[list[Expr]]:
    """The products of rows with panels: a float32x16 for each [row][panel].

    Of a `part` of the features, (chunk, how many of them, products before it), added to these.
    """
    chunk, num_chunks, before = part or (i64(0), 1, None)
    size = len(rows) * len(panels)
    chains = max(1, min(params.words, params.chains // size))
    sums = registers(size * chains)
    for i in range(size * chains):
        begin = splat(0.0)
        if before is not None and i % chains == 0:
            r, p = divmod(i // chains, len(panels))
            begin = before[r][p]
        put(sums, i, begin)
    words = weights.words // num_chunks
    first_word = chunk * i64(words)

    def add(first: Expr, count: int) -> None:
        values = [get(sums, i) for i in range(size * chains)]
        for j in range(count):
            number = first + i64(j)
            word = T.Bind(first_word + number)
            if params.tiling.ahead_words and len(rows) == 1:
                for panel in panels:
                    ahead = word + i64(params.tiling.ahead_words)
                    prefetch(weights.ahead_address(i64(0), panel, ahead, following))
            if turn is not None:
                ahead = turn.share(number, words)
                for panel in panels:
                    after = T.Bind(panel + turn.then.panels)
                    prefetch(weights.word_address(i64(0), after, ahead), params.next_cache)
            stored = [T.Bind(weights.word(i64(0), panel, word)) for panel in panels]
            for r, row in enumerate(rows):
                pair = x[i64(0), row, T.ramp(word * i64(2), i64(1), 2)]
                both = T.Bind(T.broadcast(T.reinterpret("int32", pair), PANEL))
                for p, weight in enumerate(stored):
                    i = (r * len(panels) + p) * chains + j % chains
                    values[i] = T.Bind(dot(values[i], weight, both))
        for i, value in enumerate(values):
            put(sums, i, value)

    step = params.words if chains > 1 else 1
    with T.serial(i64(words // step)) as number:
        add(T.Bind(number * i64(step)), step)
    if words % step:
        add(i64(words - words % step), words % step)
    totals = [sum_pairwise([get(sums, i * chains + c) for c in range(chains)]) for i in range(size)]
    return [totals[r * len(panels) : (r + 1) * len(panels)] for r in range(len(rows))]


def round_activations(features: int) -> tvm.tirx.PrimFunc:
    """Rounds x `[1, T, K]` f32 to bfloat16 `[1, T, K]` (as uint16); buffers x, y."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("round_activations")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = size_var("num_tokens")
            x = argument("x", (1, count, features))
            y = argument("y", (1, count, features), "uint16")

            def store(row: Expr, at: Expr) -> None:
                T.buffer_store(y, from_float32(x[i64(0), row, at]), [i64(0), row, at])

            def convert(row: Expr) -> None:
                with T.serial(i64(features // PANEL)) as vector:
                    store(row, lanes(vector * i64(PANEL)))
                if features % PANEL:
                    with T.serial(i64(features % PANEL)) as lane:
                        store(row, i64(features - features % PANEL) + lane)

            # Relax looks for reshapes among functions of one argument, and wants a block there.
            with T.sblock("rows"):
                T.reads([])
                T.writes([])
                for_each_row(count, features, convert)
    return builder.get()
