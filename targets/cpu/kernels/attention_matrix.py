"""Attention of one tile in matrix registers: many new tokens of one sequence, for one K/V head.

attention_block.py's algorithm with bfloat16 factors and float32 sums. A block's keys and values are
brought into tiles once for all of the tile's rows, which pass in strips of two groups of sixteen:

    scores [16 rows, 16 tokens]  += queries [16 rows, 32 features] · keys  [32 features, 16 tokens]
    sums  [16 rows, 16 features] += weights [16 rows, 32 tokens]  · values [32 tokens, 16 features]

The powers between the products take as long as these, so they are made of few instructions, as
exact as bfloat16 weights need them; and sums are rescaled only where a row's largest score grows by
more than SLACK: until then its weights may exceed 1, which takes nothing from their precision.

float16 becomes bfloat16 without a conversion: moved three places to the right, its bits are the
number times 2^-112, rounded. Queries and weights make up for it, half of it each, so that neither
they nor any product leaves the range of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels import amx, bfloat16
from llmc.targets.cpu.kernels.attention_pages import ContextPages, Inputs, Work, masked
from llmc.targets.cpu.kernels.attention_tile import (
    LOG2E,
    LOWEST,
    MATRIX_DEPTH,
    MATRIX_ROWS,
    MatrixTile,
    Plan,
)
from llmc.targets.cpu.kernels.avx512 import power_of_two
from llmc.targets.cpu.kernels.kv_pages import PageMatrix
from llmc.targets.cpu.kernels.math import exp2, lane_max, tanh
from llmc.targets.cpu.kernels.panels import get, lanes, put, registers, scratch, splat
from llmc.targets.cpu.kernels.vector import named

Expr = Any
LANES = 16
GROUP = amx.TILE_ROWS
SLACK = 8.0
HALF_EXPONENT = 56  # float16's bits, moved, are the number times 2^-(2 · 56)


class MatrixAttention:
    """Online softmax of a tile's rows; after `run`, its state is in three buffers.

    highest `[rows]`, totals `[rows, 16]`, sums `[rows, Dv]`: as TileAttention's, but `highest` may
    be less than the largest score by SLACK.
    """

    def __init__(self, plan: Plan, tile: MatrixTile, inputs: Inputs, work: Work) -> None:
        assert plan.matrix is not None, plan
        self.plan, self.tile, self.inputs, self.work = plan, tile, inputs, work
        self.pages = ContextPages(plan, inputs, work)
        self.block = plan.matrix.block_tokens
        self.highest = scratch((tile.rows,))
        self.totals = scratch((tile.rows, LANES))
        self.sums = scratch((tile.rows, plan.v_head_dim))
        steps, pairs = plan.head_dim // MATRIX_DEPTH, self.block // MATRIX_DEPTH
        self._q = scratch((tile.rows // GROUP, steps, GROUP, MATRIX_DEPTH), "uint16")
        self._k = scratch((self.block // LANES, plan.head_dim // 2, LANES), "int32")
        self._v = scratch((pairs, plan.v_head_dim // LANES, MATRIX_DEPTH // 2, LANES), "int32")
        # Two tiles of scores become one of weights, in the first one's place.
        self._scores = scratch((pairs, amx.PANELS, MATRIX_ROWS, LANES))
        if plan.kv.scaled:
            self._k_scales = scratch((self.block,))
            self._v_scales = scratch((self.block,))
        self._num_rows = named(work.num_tokens * i64(plan.heads))
        # Queries and scores, weights and sums are this many powers of two too large.
        self._exponent = HALF_EXPONENT if plan.kv.dtype == "float16" else 0

    def run(self) -> None:
        """Walks the pages from begin to end."""
        plan, work = self.plan, self.work
        pages = i64(self.block // plan.page_size)
        amx.configure(amx.TILE_BYTES)
        self._start()
        with T.serial(T.ceildiv(work.end - work.begin, pages)) as block:
            first = named(work.begin + block * pages)
            begin = named(first * i64(plan.page_size))
            count = named(T.min(work.end - first, pages) * i64(plan.page_size))
            if plan.kv.scaled:
                self.pages.load_scales(first, self._k_scales, self._v_scales)
            self._unpack_keys(first, count)
            self._unpack_values(first, named(T.min(count, self.pages.num_seen - begin)))
            with T.serial(T.ceildiv(self._num_rows, i64(MATRIX_ROWS))) as strip:
                self._strip(named(strip * i64(MATRIX_ROWS)), begin, count)
        self._finish()
        amx.release()

    def _start(self) -> None:
        """Scaled queries in tiles, and the state before the first block."""
        plan, work = self.plan, self.work
        scale = splat(plan.query_scale * 2.0**self._exponent)
        groups = T.ceildiv(self._num_rows, i64(GROUP))
        with T.serial(groups * i64(GROUP)) as row:
            T.buffer_store(self.highest, T.float32(LOWEST), [row])
            T.buffer_store(self.totals, splat(0.0), [row, lanes(i64(0))])
            with T.serial(i64(plan.v_head_dim // LANES)) as c:
                T.buffer_store(self.sums, splat(0.0), [row, lanes(c * i64(LANES))])
            # Padding rows repeat the last one: nobody reads them.
            source = named(T.min(row, self._num_rows - i64(1)))
            token = named(work.first_row + T.floordiv(source, i64(plan.heads)))
            head = named(work.head * i64(plan.heads) + T.floormod(source, i64(plan.heads)))
            group, place = T.floordiv(row, i64(GROUP)), T.floormod(row, i64(GROUP))
            with T.serial(i64(plan.head_dim // MATRIX_DEPTH)) as step:
                low, high = (
                    self.inputs.q[i64(0), token, head, lanes(step * i64(MATRIX_DEPTH) + i64(c))]
                    * scale
                    for c in (0, LANES)
                )
                where = [group, step, place, T.ramp(i64(0), i64(1), MATRIX_DEPTH)]
                T.buffer_store(self._q, bfloat16.rounded(low, high), where)

    def _finish(self) -> None:
        """Takes the powers of two back that float16 needs."""
        if self._exponent == 0:
            return
        with T.serial(self._num_rows) as row:
            self._scale_row(row, splat(2.0**-self._exponent), splat(2.0**self._exponent))

    def _scale_row(self, row: Expr, totals: Expr, sums: Expr) -> None:
        where = [row, lanes(i64(0))]
        T.buffer_store(self.totals, self.totals[tuple(where)] * totals, where)
        for c in range(self.plan.v_head_dim // LANES):
            where = [row, lanes(i64(c * LANES))]
            T.buffer_store(self.sums, self.sums[tuple(where)] * sums, where)

    # Pages into tiles: pairs of features, and pairs of tokens.

    def _unpack_keys(self, first: Expr, count: Expr) -> None:
        n = i64(self.plan.page_size)
        with T.serial(T.floordiv(count, i64(LANES))) as j:
            token = named(j * i64(LANES))
            keys = self.pages.keys(self.pages.page(first + T.floordiv(token, n)))
            column = named(T.floormod(token, n))
            with T.serial(i64(self.plan.head_dim // 2)) as step:
                T.buffer_store(self._k, _pairs(keys, step, column), [j, step, lanes(i64(0))])

    def _unpack_values(self, first: Expr, count: Expr) -> None:
        """Values of `count` tokens, and zeros behind them: their weights are zero as well, but
        stale pages hold any bits.
        """
        plan = self.plan
        n, depth = i64(plan.page_size), i64(MATRIX_DEPTH // 2)
        tokens = named(T.ceildiv(count, i64(2)))

        def store(step: Expr, c: Expr, pairs: Expr) -> None:
            where = [T.floordiv(step, depth), c, T.floormod(step, depth), lanes(i64(0))]
            T.buffer_store(self._v, pairs, where)

        with T.serial(T.ceildiv(count, n)) as j:
            values = self.pages.values(self.pages.page(first + j))
            steps = named(T.min(tokens - j * i64(plan.page_size // 2), i64(plan.page_size // 2)))
            with T.serial(steps) as step:
                of_block = named(j * i64(plan.page_size // 2) + step)
                limit = named(count - j * n)
                with T.serial(i64(plan.v_head_dim // LANES)) as c:
                    store(of_block, c, _pairs(values, step, c * i64(LANES), limit))
        rest = T.ceildiv(tokens, depth) * depth - tokens
        with T.serial(rest) as step, T.serial(i64(plan.v_head_dim // LANES)) as c:
            store(named(tokens + step), c, T.broadcast(T.int32(0), LANES))

    # One strip of rows × one block of tokens.

    def _strip(self, top: Expr, begin: Expr, count: Expr) -> None:
        """Rows from `top` on, and tokens from `begin` on, of which some rows see none."""
        plan, work = self.plan, self.work
        rows = named(T.min(self._num_rows - top, i64(MATRIX_ROWS)))
        last = named(top + rows - i64(1))
        # Where the strip's first and last token stand, counted from the block's begin.
        here = T.Cast("int64", work.position) - begin
        nearest = named(here + T.floordiv(top, i64(plan.heads)))
        farthest = named(here + T.floordiv(last, i64(plan.heads)))
        stop = named(T.ceildiv(T.min(count, farthest + i64(1)), i64(MATRIX_DEPTH)))
        start: Expr = i64(0)
        if plan.window is not None:
            oldest = T.max(nearest - i64(plan.window - 1), i64(0))
            start = named(T.floordiv(oldest, i64(MATRIX_DEPTH)))

        def emit(groups: int) -> None:
            self._score(top, groups, start, stop)
            self._adjust(top, rows, begin, (nearest, farthest), start, stop)
            with T.serial(rows) as row:
                self._soften(top, row, start, stop)
            self._weigh(top, groups, start, stop)

        with T.If(stop > start), T.Then(), T.If(rows > i64(GROUP)):
            with T.Then():
                emit(2)
            with T.Else():
                emit(1)

    def _score(self, top: Expr, groups: int, start: Expr, stop: Expr) -> None:
        """Queries times keys, of 32 tokens at a time."""
        tiles = [(g, p) for g in range(groups) for p in range(amx.PANELS)]
        group = named(T.floordiv(top, i64(GROUP)))
        with T.serial(stop - start) as turn:
            pair = named((start + turn) * i64(amx.PANELS))
            for g, p in tiles:
                amx.clear(amx.sum_tile(g, p))
            for step in range(self.plan.head_dim // MATRIX_DEPTH):

                def queries(g: int, step: int = step) -> Expr:
                    return self._q[group + i64(g), i64(step), i64(0), i64(0)]

                def keys(p: int, step: int = step) -> Expr:
                    return self._k[pair + i64(p), i64(step * MATRIX_DEPTH // 2), i64(0)]

                _multiply(tiles, queries, keys)
            for g, p in tiles:
                to = self._scores[start + turn, i64(p), i64(g * GROUP), i64(0)]
                amx.store(amx.sum_tile(g, p), T.address_of(to), amx.TILE_BYTES)

    def _weigh(self, top: Expr, groups: int, start: Expr, stop: Expr) -> None:
        """Weights times values, of 32 features at a time."""
        tiles = [(g, p) for g in range(groups) for p in range(amx.PANELS)]
        stride = 4 * self.plan.v_head_dim
        with T.serial(i64(self.plan.v_head_dim // (amx.PANELS * LANES))) as part:

            def sums(g: int, p: int) -> Expr:
                column = (part * i64(amx.PANELS) + i64(p)) * i64(LANES)
                return T.address_of(self.sums[top + i64(g * GROUP), column])

            for g, p in tiles:
                amx.load(amx.sum_tile(g, p), sums(g, p), stride)
            with T.serial(stop - start) as turn:
                pair = T.Bind(start + turn)

                def weights(g: int, pair: Expr = pair) -> Expr:
                    return self._scores[pair, i64(0), i64(g * GROUP), i64(0)]

                def values(p: int, pair: Expr = pair) -> Expr:
                    return self._v[pair, part * i64(amx.PANELS) + i64(p), i64(0), i64(0)]

                _multiply(tiles, weights, values)
            for g, p in tiles:
                amx.store(amx.sum_tile(g, p), sums(g, p), stride)

    def _adjust(
        self,
        top: Expr,
        rows: Expr,
        begin: Expr,
        tokens: tuple[Expr, Expr],
        start: Expr,
        stop: Expr,
    ) -> None:
        """Scales and caps scores, and hides what rows do not see."""
        plan = self.plan
        always = plan.kv.scaled or plan.softcap is not None
        nearest, farthest = tokens
        with T.serial(stop - start) as turn:
            pair = named(start + turn)
            first = named(pair * i64(MATRIX_DEPTH))
            hidden = first + i64(MATRIX_DEPTH - 1) > nearest
            if plan.window is not None:
                hidden = tirx.Or(hidden, first <= farthest - i64(plan.window))

            def each(hide: bool, pair: Expr = pair, first: Expr = first) -> None:
                with T.serial(rows) as row:
                    token = T.floordiv(top + row, i64(plan.heads))
                    position = T.Cast("int64", self.work.position) - begin + token
                    distance = named(T.Cast("int32", position - first))
                    for p in range(amx.PANELS):
                        at = (pair, i64(p), row, lanes(i64(0)))
                        score = self._capped(self._scores[at], first + i64(p * LANES))
                        if hide:
                            score = masked(plan, score, distance - T.int32(p * LANES))
                        T.buffer_store(self._scores, score, list(at))

            with T.If(hidden):
                with T.Then():
                    each(True)
                if always:
                    with T.Else():
                        each(False)

    def _capped(self, score: Expr, token: Expr) -> Expr:
        plan = self.plan
        if plan.kv.scaled:
            score = score * self._k_scales[lanes(token)]
        if plan.softcap is not None:
            score = tanh(score * splat(2.0**self._exponent))
            score = score * splat(plan.softcap * LOG2E * 2.0**-self._exponent)
        return score

    def _soften(self, top: Expr, row: Expr, start: Expr, stop: Expr) -> None:
        """Turns a row of scores into weights; updates its maximum and its sum."""
        whole = top + row
        acc = registers(2)
        for p in range(2):
            put(acc, p, splat(LOWEST))
        with T.serial(stop - start) as turn:
            for p in range(2):
                put(acc, p, T.max(get(acc, p), self._score_of(start + turn, p, row)))
        unit = 2.0**self._exponent
        limit = T.broadcast(self.highest[whole] + T.float32(SLACK), LANES)
        seen = T.Bind(T.max(get(acc, 0), get(acc, 1)) * splat(unit))
        with T.If(_any(seen > limit)), T.Then():
            largest = named(lane_max(seen))
            correction = T.broadcast(named(exp2(self.highest[whole] - largest)), LANES)
            self._scale_row(whole, correction, correction)
            T.buffer_store(self.highest, largest, [whole])
        offset = named(T.float32(self._exponent) - self.highest[whole])
        put(acc, 0, self.totals[whole, lanes(i64(0))])
        put(acc, 1, splat(0.0))
        weights = registers(2)
        with T.serial(stop - start) as turn:
            pair = T.Bind(start + turn)
            for p in range(2):
                score = self._score_of(pair, p, row)
                put(weights, p, power_of_two(score * splat(unit) + T.broadcast(offset, LANES)))
                put(acc, p, get(acc, p) + get(weights, p))
                if self.plan.kv.scaled:
                    column = pair * i64(MATRIX_DEPTH) + i64(p * LANES)
                    put(weights, p, get(weights, p) * self._v_scales[lanes(column)])
            pairs = T.reinterpret("float32x16", bfloat16.rounded(get(weights, 0), get(weights, 1)))
            T.buffer_store(self._scores, pairs, [pair, i64(0), row, lanes(i64(0))])
        T.buffer_store(self.totals, get(acc, 0) + get(acc, 1), [whole, lanes(i64(0))])

    def _score_of(self, pair: Expr, p: int, row: Expr) -> Expr:
        return self._scores[pair, i64(p), row, lanes(i64(0))]


def _multiply(
    tiles: list[tuple[int, int]], left: Callable[[int], Expr], right: Callable[[int], Expr]
) -> None:
    """One step of depth of all sums: left and right give the begins of tiles of 1 KiB."""
    for g, p in tiles:
        if g == 0:
            amx.load(amx.weight_tile(p), T.address_of(right(p)), amx.TILE_BYTES)
        if p == 0:
            amx.load(amx.activation_tile(g), T.address_of(left(g)), amx.TILE_BYTES)
        amx.multiply("tdpbf16ps", amx.sum_tile(g, p), amx.activation_tile(g), amx.weight_tile(p))


def _pairs(matrix: PageMatrix, step: Expr, column: Expr, limit: Expr | None = None) -> Expr:
    """16 columns of rows 2 · step and 2 · step + 1 as pairs of bfloat16, int32x16.

    float16 comes as its number times 2^-112, int8 as codes. Rows from `limit` on are zero.
    """
    if matrix.kv.unit == 2:
        return matrix.load_pairs(step, column, LANES, limit)
    rows = [step * i64(2) + i64(r) for r in range(2)]
    kept: Expr = T.int32(-1)
    if limit is not None:
        kept = T.Select(step * i64(2) + i64(1) < limit, T.int32(-1), T.int32(0xFFFF))
    if matrix.kv.dtype == "float16":
        bits = tirx.Shuffle([matrix.bits(row, column, LANES) for row in rows], bfloat16.PAIRS)
        half = T.broadcast(T.uint16(4), 2 * LANES)
        moved = T.shift_right(
            T.reinterpret("int16x32", bits + half), T.broadcast(T.int16(3), 2 * LANES)
        )
        # The sign fills the places that the exponent left.
        kept = T.bitwise_and(kept, T.int32(0x8FFF8FFF - (1 << 32)))
        pairs = T.reinterpret("int32x16", moved)
    else:
        pairs = bfloat16.rounded_pairs(*(matrix.load(row, column, LANES)[0] for row in rows))
        if limit is None:
            return pairs
    return T.bitwise_and(pairs, T.broadcast(kept, LANES))


def _any(lanes: Expr) -> Expr:
    """Whether one of 16 is true."""
    return T.call_llvm_pure_intrin("bool", "llvm.vector.reduce.or", lanes)
