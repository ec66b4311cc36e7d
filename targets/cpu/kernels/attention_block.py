"""Attention of one tile: a few new tokens of one sequence, for one K/V head.

The algorithm is FlashAttention's online softmax in float32 (Dao et al., 2022) over blocks of pages,
with powers of two. All query heads that share the K/V head make the tile's rows (token-major), so
that each vector of K and V is loaded once for all of them. Scores have tokens across the lanes,
outputs have features. A tile of many rows converts a block's K and V once; a tile of few reads them
from the pages and asks for the next ones early: for V while it multiplies K, and the reverse.

Masked scores are -inf and the running maximum starts at a finite number, so that a block of which
a row sees nothing adds nothing that lasts. V is never read past the last token a tile sees, so
that stale pages cannot put a NaN in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64, on_stack
from llmc.targets.cpu.kernels import bfloat16
from llmc.targets.cpu.kernels.attention_pages import ContextPages, Inputs, Work, masked
from llmc.targets.cpu.kernels.attention_tile import LOG2E, LOWEST, Plan, Tile
from llmc.targets.cpu.kernels.avx512 import power_of_two
from llmc.targets.cpu.kernels.kv_pages import PageMatrix
from llmc.targets.cpu.kernels.math import exp2, lane_max, tanh
from llmc.targets.cpu.kernels.panels import prefetch, scratch
from llmc.targets.cpu.kernels.vector import at, lanes_of, named, registers, spread

Expr = Any
LINE_BYTES = 64


class TileAttention:
    """Online softmax of a tile's rows; after `run`, its state is in three buffers.

    highest `[rows]`: the largest score (in units of log2); totals `[rows, page_lanes]`: lane sums
    of the weights 2^(score - highest); sums `[rows, Dv]`: the weights times V.
    """

    def __init__(self, plan: Plan, tile: Tile, inputs: Inputs, work: Work) -> None:
        self.plan, self.tile, self.inputs, self.work = plan, tile, inputs, work
        self.pages = ContextPages(plan, inputs, work)
        # Items of few rows are short, and seven calls for memory were a tenth of them.
        place = on_stack if tile.few else scratch
        self.highest = place((tile.rows,))
        self.totals = place((tile.rows, plan.page_lanes))
        self.sums = place((tile.rows, plan.v_head_dim))
        self._block_pages = plan.block_pages(tile)
        self._block_tokens = self._block_pages * plan.page_size
        dtype = "uint16" if tile.bf16 else "float32"
        self._q = place((tile.rows, plan.head_dim), dtype)
        self._scores = place((tile.rows, self._block_tokens))
        # Softened scores: in place, or rounded beside them.
        self._weights = place((tile.rows, self._block_tokens), dtype) if tile.bf16 else self._scores
        self._corrections = place((tile.rows,))
        word = "int32" if tile.bf16 else "float32"
        if tile.unpack:
            self._k = place((plan.head_dim // tile.unit, self._block_tokens), word)
            self._v = place((self._block_tokens // tile.unit, plan.v_head_dim), word)
        if plan.kv.scaled:
            self._k_scales = place((self._block_tokens,))
            self._v_scales = place((self._block_tokens,))
        self._num_rows = named(work.num_tokens * i64(plan.heads))
        self._num_strips = named(T.ceildiv(self._num_rows, i64(tile.strip)))

    def run(self) -> None:
        """Walks the pages from begin to end."""
        plan, work = self.plan, self.work
        pages = i64(self._block_pages)
        if not self.tile.unpack:
            self._prefetch_first()
        self._start()
        with T.serial(T.ceildiv(work.end - work.begin, pages)) as block:
            first = named(work.begin + block * pages)
            count = named(T.min(pages, work.end - first))
            if plan.kv.scaled:
                self.pages.load_scales(first, self._k_scales, self._v_scales)
            if self.tile.unpack:
                self._unpack_keys(first, count)
            self._score(first, count)
            with T.serial(self._num_rows) as row:
                self._soften(row, first, count)
            if self.tile.unpack:
                self._unpack_values(first, count)
            self._weigh_values(first, count)

    def _start(self) -> None:
        """Scaled queries, padded with zero rows, and the state before the first block."""
        plan, work = self.plan, self.work
        lanes = lanes_of(plan.head_dim)
        value_lanes = plan.value_lanes
        with T.serial(self._num_strips * i64(self.tile.strip)) as row:
            T.buffer_store(self.highest, T.float32(LOWEST), [row])
            zeros = spread(T.float32(0), plan.page_lanes)
            T.buffer_store(self.totals, zeros, [row, at(i64(0), plan.page_lanes)])
            with T.serial(i64(plan.v_head_dim // value_lanes)) as c:
                zeros = spread(T.float32(0), value_lanes)
                T.buffer_store(self.sums, zeros, [row, at(c * i64(value_lanes), value_lanes)])
            # Padding rows repeat the last one: nobody reads them.
            source = named(T.min(row, self._num_rows - i64(1)))
            token = named(work.first_row + T.floordiv(source, i64(plan.heads)))
            head = named(work.head * i64(plan.heads) + T.floormod(source, i64(plan.heads)))
            with T.serial(i64(plan.head_dim // lanes)) as c:
                column = at(c * i64(lanes), lanes)
                query = self.inputs.q[i64(0), token, head, column]
                query = query * spread(T.float32(plan.query_scale), lanes)
                query = bfloat16.rounded_one(query) if self.tile.bf16 else query
                T.buffer_store(self._q, query, [row, column])

    def _prefetch_first(self) -> None:
        """Asks for the first block's keys; all later pages are asked for while others are read."""
        plan, work = self.plan, self.work
        lines = -(-plan.keys.num_bytes // LINE_BYTES)
        with T.serial(T.min(i64(self._block_pages), work.end - work.begin)) as j:
            keys = self.pages.keys(self.pages.page(work.begin + j))
            with T.serial(i64(lines)) as line:
                self._prefetch(keys, line * i64(LINE_BYTES))

    def _prefetch(self, matrix: PageMatrix, num_bytes: Expr) -> None:
        """Asks for the line of a page's byte `num_bytes`."""
        prefetch(matrix.address(num_bytes), self.plan.tuning.ahead_cache)

    # Products: rows × vectors of accumulators.

    def _multiply(
        self, acc: Expr, lanes: int, factors: Expr, step: Expr, top: Expr, vectors: list[list[Expr]]
    ) -> None:
        """Adds the outer product of a strip's factors with `vectors`, one list per row of a step.

        factors `[rows, ·]`: column unit · step + u meets vectors[u]; pairs are one vector.
        """
        count = len(vectors[0])
        for u, row_vectors in enumerate(vectors):
            bound = [T.Bind(vector) for vector in row_vectors]
            for r in range(self.tile.strip):
                if self.tile.bf16:
                    pair = factors[top + i64(r), T.ramp(step * i64(2), i64(1), 2)]
                    scalar = T.reinterpret("int32", pair)
                else:
                    scalar = factors[top + i64(r), step * i64(len(vectors)) + i64(u)]
                factor = T.Bind(spread(scalar, lanes))
                for c, vector in enumerate(bound):
                    index = at(i64((r * count + c) * lanes), lanes)
                    total = (
                        bfloat16.dot(acc[index], factor, vector)
                        if self.tile.bf16
                        else acc[index] + factor * vector
                    )
                    T.buffer_store(acc, total, [index])

    def _loaded(
        self,
        matrices: list[PageMatrix],
        step: Expr,
        columns: list[Expr],
        lanes: int,
        limit: Expr | None = None,
    ) -> list[list[Expr]]:
        """Vectors straight from pages, for `_multiply`."""
        if self.tile.bf16:
            return [
                [
                    m.load_pairs(step, c, lanes, limit)
                    for m, c in zip(matrices, columns, strict=True)
                ]
            ]
        rows = [m.load(step, c, lanes, limit) for m, c in zip(matrices, columns, strict=True)]
        return [list(row) for row in zip(*rows, strict=True)]

    def _score(self, first: Expr, count: Expr) -> None:
        """Masked q · K of the block's first `count` pages."""
        plan, tile = self.plan, self.tile
        lanes = plan.page_lanes
        at_once = plan.vectors_at_once(tile, self._block_tokens // lanes)
        if tile.unpack:
            groups = T.ceildiv(count * i64(plan.page_size), i64(at_once * lanes))
            self._score_groups(first, i64(0), groups, at_once)
            return
        vectors = named(count * i64(plan.page_size // lanes))
        groups = named(T.floordiv(vectors, i64(at_once)))
        self._score_groups(first, i64(0), groups, at_once)
        if at_once > 1:  # the last block is seldom full
            done = named(groups * i64(at_once))
            self._score_groups(first, done, vectors - done, 1)

    def _score_groups(self, first: Expr, done: Expr, groups: Expr, at_once: int) -> None:
        """Scores of groups of `at_once` vectors of tokens, behind `done` vectors of the block."""
        plan, tile = self.plan, self.tile
        lanes = plan.page_lanes
        with T.serial(groups) as group, T.serial(self._num_strips) as strip:
            top = named(strip * i64(tile.strip))
            acc = registers(tile.strip * at_once * lanes)
            for index in range(tile.strip * at_once):
                T.buffer_store(acc, spread(T.float32(0), lanes), [at(i64(index * lanes), lanes)])
            start = named((done + group * i64(at_once)) * i64(lanes))
            if tile.unpack:
                with T.serial(i64(plan.head_dim // tile.unit)) as step:
                    vectors = [
                        self._k[step, at(start + i64(c * lanes), lanes)] for c in range(at_once)
                    ]
                    self._multiply(acc, lanes, self._q, step, top, [vectors])
            else:
                self._score_pages(acc, first, start, top, at_once)
            self._store_scores(acc, first, start, top, at_once)

    def _score_pages(self, acc: Expr, first: Expr, start: Expr, top: Expr, at_once: int) -> None:
        """Accumulates the scores of `at_once` vectors of tokens, and asks for their values."""
        plan = self.plan
        lanes, n = plan.page_lanes, plan.page_size
        tokens = [start + i64(c * lanes) for c in range(at_once)]
        pages = [self.pages.page(first + T.floordiv(t, i64(n))) for t in tokens]
        columns = [i64(0) if lanes == n else T.Bind(T.floormod(t, i64(n))) for t in tokens]
        keys = [self.pages.keys(page) for page in pages]
        values = [self.pages.values(page) for page in pages]
        row_bytes = plan.kv.unit * n * plan.kv.num_bytes
        steps = plan.head_dim // plan.kv.unit
        # One prefetch a line: the steps between two lines are straight code.
        straight = max(1, LINE_BYTES // row_bytes)
        straight = straight if steps % straight == 0 else 1
        with T.serial(i64(steps // straight)) as turn:
            for matrix in values:
                self._prefetch(matrix, turn * i64(straight * row_bytes))
            for s in range(straight):
                step = turn * i64(straight) + i64(s)
                vectors = self._loaded(keys, step, columns, lanes)
                self._multiply(acc, lanes, self._q, step, top, vectors)

    def _store_scores(self, acc: Expr, first: Expr, start: Expr, top: Expr, at_once: int) -> None:
        plan = self.plan
        lanes = plan.page_lanes
        for r in range(self.tile.strip):
            row = top + i64(r)
            token = T.floordiv(row, i64(plan.heads))
            position = T.Bind(self.work.position + T.Cast("int32", token))
            for c in range(at_once):
                column = start + i64(c * lanes)
                score = acc[at(i64((r * at_once + c) * lanes), lanes)]
                if plan.kv.scaled:
                    score = score * self._k_scales[at(column, lanes)]
                if plan.softcap is not None:
                    score = tanh(score) * spread(T.float32(plan.softcap * LOG2E), lanes)
                key_position = T.Cast("int32", first * i64(plan.page_size) + column)
                score = masked(plan, score, position - key_position)
                T.buffer_store(self._scores, score, [row, at(column, lanes)])

    def _soften(self, row: Expr, first: Expr, count: Expr) -> None:
        """Turns a row of scores into weights; updates its maximum and its sum."""
        plan = self.plan
        lanes = plan.page_lanes
        num_vectors = T.Bind(count * i64(plan.page_size // lanes))
        acc, all_lanes = registers(lanes), at(i64(0), lanes)
        T.buffer_store(acc, spread(T.float32(LOWEST), lanes), [all_lanes])
        with T.serial(num_vectors) as c:
            score = self._scores[row, at(c * i64(lanes), lanes)]
            T.buffer_store(acc, T.max(acc[all_lanes], score), [all_lanes])
        maximum, weights = registers(1), registers(lanes)
        zero = i64(0)
        T.buffer_store(maximum, T.max(self.highest[row], lane_max(acc[all_lanes])), [zero])
        T.buffer_store(self._corrections, exp2(self.highest[row] - maximum[zero]), [row])
        T.buffer_store(self.highest, maximum[zero], [row])
        total = self.totals[row, all_lanes] * spread(self._corrections[row], lanes)
        T.buffer_store(acc, total, [all_lanes])
        with T.serial(num_vectors) as c:
            if not self.tile.unpack:
                self._prefetch_keys(first, row, c)
            column = at(c * i64(lanes), lanes)
            power = power_of_two if self.tile.bf16 else exp2
            softened = power(self._scores[row, column] - spread(maximum[zero], lanes))
            T.buffer_store(weights, softened, [all_lanes])
            weight = weights[all_lanes]
            T.buffer_store(acc, acc[all_lanes] + weight, [all_lanes])
            if plan.kv.scaled:
                weight = weight * self._v_scales[column]
            stored = bfloat16.rounded_one(weight) if self.tile.bf16 else weight
            T.buffer_store(self._weights, stored, [row, column])
        T.buffer_store(self.totals, acc[all_lanes], [row, all_lanes])

    def _prefetch_keys(self, first: Expr, row: Expr, c: Expr) -> None:
        """Asks for some of the next block's keys: memory should not idle while rows soften."""
        plan = self.plan
        number = T.floordiv(c * i64(plan.page_lanes), i64(plan.page_size))
        keys = self.pages.keys(self.pages.page(first + number + i64(self._block_pages)))
        page_lines = -(-plan.keys.num_bytes // LINE_BYTES)
        lines = -(-page_lines // (plan.tuning.soften_lines * self.tile.rows))
        for line in range(lines):
            offset = (row * i64(lines) + i64(line)) * i64(LINE_BYTES)
            self._prefetch(keys, T.min(offset, i64(plan.keys.num_bytes - 1)))

    def _weigh_values(self, first: Expr, count: Expr) -> None:
        """Sums = sums · correction + weights · V of the block's pages."""
        plan, tile = self.plan, self.tile
        lanes = plan.value_lanes
        at_once = plan.vectors_at_once(tile, plan.v_head_dim // lanes)
        parts = plan.v_head_dim // (lanes * at_once)
        with T.serial(self._num_strips) as strip, T.serial(i64(parts)) as part:
            top = named(strip * i64(tile.strip))
            acc = registers(tile.strip * at_once * lanes)
            columns = [T.Bind((part * i64(at_once) + i64(c)) * i64(lanes)) for c in range(at_once)]

            def each(action: Callable[[Expr, Expr, Expr], None]) -> None:
                for r in range(tile.strip):
                    for c, column in enumerate(columns):
                        where = at(i64((r * at_once + c) * lanes), lanes)
                        action(top + i64(r), at(column, lanes), where)

            def load(row: Expr, column: Expr, where: Expr) -> None:
                correction = spread(self._corrections[row], lanes)
                T.buffer_store(acc, self.sums[row, column] * correction, [where])

            def store(row: Expr, column: Expr, where: Expr) -> None:
                T.buffer_store(self.sums, acc[where], [row, column])

            each(load)
            if tile.unpack:
                tokens = T.min(
                    count * i64(plan.page_size), self.pages.num_seen - first * i64(plan.page_size)
                )
                with T.serial(T.ceildiv(tokens, i64(tile.unit))) as step:
                    vectors = [self._v[step, at(column, lanes)] for column in columns]
                    self._multiply(acc, lanes, self._weights, step, top, [vectors])
            else:
                self._weigh_pages(acc, first, count, top, columns)
            each(store)

    def _weigh_pages(
        self, acc: Expr, first: Expr, count: Expr, top: Expr, columns: list[Expr]
    ) -> None:
        """Adds weights · V straight from the pages, and asks for the next block's keys."""
        plan = self.plan
        lanes, n, unit = plan.value_lanes, i64(plan.page_size), plan.kv.unit
        row_bytes = unit * plan.v_head_dim * plan.kv.num_bytes
        with T.serial(count) as j:
            values = self.pages.values(self.pages.page(first + j))
            keys = self.pages.keys(self.pages.page(first + j + i64(self._block_pages)))
            seen = named(T.min(n, self.pages.num_seen - (first + j) * n))
            with T.serial(T.ceildiv(seen, i64(unit))) as step:
                for line in range(-(-row_bytes // LINE_BYTES)):
                    self._prefetch(keys, step * i64(row_bytes) + i64(line * LINE_BYTES))
                vectors = self._loaded([values] * len(columns), step, columns, lanes, seen)
                block_step = T.Bind(j * i64(plan.page_size // unit) + step)
                self._multiply(acc, lanes, self._weights, block_step, top, vectors)

    # Unpacking: float32, or pairs of bfloat16.

    def _unpack_keys(self, first: Expr, count: Expr) -> None:
        plan = self.plan
        lanes = plan.page_lanes
        with T.serial(count) as j:
            keys = self.pages.keys(self.pages.page(first + j))

            def store(step: Expr, column: Expr, value: Expr) -> None:
                T.buffer_store(self._k, value, [step, at(j * i64(plan.page_size) + column, lanes)])

            self._unpack(keys, i64(plan.head_dim), lanes, store)
        # Scores are made of several vectors at once. What lies behind the last page is masked, but
        # multiplied: old bits that read as denormal numbers would take ten times as long.
        unpacked = count * i64(plan.page_size)
        at_once = lanes * plan.vectors_at_once(self.tile, self._block_tokens // lanes)
        rest = T.ceildiv(unpacked, i64(at_once)) * i64(at_once) - unpacked
        with T.serial(T.floordiv(rest, i64(lanes))) as c:
            column = T.Bind(unpacked + c * i64(lanes))
            with T.serial(i64(plan.head_dim // self.tile.unit)) as step:
                zeros = spread(tirx.const(0, self._k.dtype), lanes)
                T.buffer_store(self._k, zeros, [step, at(column, lanes)])

    def _unpack_values(self, first: Expr, count: Expr) -> None:
        plan = self.plan
        lanes, n = plan.value_lanes, i64(plan.page_size)
        with T.serial(count) as j:
            values = self.pages.values(self.pages.page(first + j))
            seen = named(T.min(n, self.pages.num_seen - (first + j) * n))

            def store(step: Expr, column: Expr, value: Expr) -> None:
                start = j * i64(plan.page_size // self.tile.unit)
                T.buffer_store(self._v, value, [start + step, at(column, lanes)])

            self._unpack(values, seen, lanes, store)

    def _unpack(
        self,
        matrix: PageMatrix,
        num_rows: Expr,
        lanes: int,
        store: Callable[[Expr, Expr, Expr], None],
    ) -> None:
        """`store(step, column, vector)` for a matrix' first rows, in steps of the products."""
        unit = max(self.tile.unit, self.plan.kv.unit)
        with T.serial(T.ceildiv(num_rows, i64(unit))) as turn:
            with T.serial(i64(matrix.columns // lanes)) as c:
                column = T.Bind(c * i64(lanes))
                if self.plan.kv.unit == 2:
                    rows = matrix.load(turn, column, lanes, num_rows)
                else:
                    steps = [turn * i64(unit) + i64(u) for u in range(unit)]
                    rows = [v for step in steps for v in matrix.load(step, column, lanes)]
                if self.tile.bf16:
                    low, high = rows
                    # An odd last row has a pair, too, where the page may hold a NaN.
                    has_pair = turn * i64(2) + i64(1) < num_rows
                    high = T.Select(has_pair, high, spread(T.float32(0), lanes))
                    rows = [bfloat16.rounded_pairs(low, high)]
                for u, row in enumerate(rows):
                    store(turn * i64(len(rows)) + i64(u), column, row)
