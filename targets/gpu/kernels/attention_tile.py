"""Attention of several new tokens of a sequence: a block for each tile of them and K/V head.

A tile's rows are its tokens times the query heads that share the K/V head (token-major), so that
keys and values are read once for all of them. The block walks the context in steps of `positions`:
scores, online softmax in float32 (FlashAttention, Dao et al., 2022) with powers of two, weighted
values. Queries stay in shared memory; keys and values pass through a small stage there. 16 threads
lie across positions or features, the others across rows; what a thread has of each lies side by
side in fours, which it reads at once.

Masked scores are LOWEST, which is finite: a block of which a row sees nothing adds nothing that
lasts. V is never read past the last token that the tile sees, so that stale pages cannot put a NaN
in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import f32, i64, put, registers, to_f32, when
from llmc.targets.gpu.kernels.attention_inputs import Inputs, Shape
from llmc.targets.gpu.kernels.attention_plans import ACROSS, TilePlan
from llmc.targets.gpu.kernels.block import (
    LOWEST,
    launch,
    quotient,
    quotient_up,
    read_vector,
    remainder,
    shared,
    strided,
    sync,
    when_all,
    write_vector,
)
from llmc.targets.gpu.layout import ceildiv

Expr = Any


def prefill(shape: Shape, inputs: Inputs, plan: TilePlan) -> None:
    """Emits the launch for all sequences with more than one new token."""
    head_tiles = shape.heads // plan.heads
    # Every sequence may end in a tile that is not full.
    tiles = quotient(inputs.rows, plan.tokens) + inputs.sequences
    grid = (tiles, shape.num_kv_heads * head_tiles)
    with launch(grid, (plan.threads,)) as (tile, head_tile, thread):
        found = registers((2,), "int32")
        _find(inputs, plan, tile, found)
        with when_all(found[i64(0)] >= T.int32(0)):
            _Tile(shape, inputs, plan, found, head_tile, thread).emit()


def _find(inputs: Inputs, plan: TilePlan, tile: Expr, found: Expr) -> None:
    """found = (sequence or -1, tile within the sequence) of the batch's tile number `tile`."""
    put(found, T.int32(-1), 0)
    left = registers((1,), "int32")
    put(left, T.Cast("int32", tile), 0)
    with T.serial(inputs.sequences) as sequence:
        new = T.Bind(inputs.q_starts[sequence + i64(1)] - inputs.q_starts[sequence])
        tiles = T.floordiv(new + T.int32(plan.tokens - 1), T.int32(plan.tokens))
        tiles = T.Bind(T.if_then_else(new > T.int32(1), tiles, T.int32(0)))
        inside = T.And(left[i64(0)] >= T.int32(0), left[i64(0)] < tiles)
        with when(inside):
            put(found, T.Cast("int32", sequence), 0)
            put(found, left[i64(0)], 1)
        put(left, left[i64(0)] - tiles, 0)


def _side_by_side(number: int, lanes: int, thread: Expr, threads: int) -> Expr:
    """Where a thread has its item `number`: `lanes` of them lie side by side."""
    group, lane = divmod(number, lanes)
    return thread * i64(lanes) + i64(group * lanes * threads + lane)


class _Tile:
    """One block's tokens and heads."""

    def __init__(
        self, shape: Shape, inputs: Inputs, plan: TilePlan, found: Expr, head: Expr, thread: Expr
    ) -> None:
        self.shape, self.inputs, self.plan, self.thread = shape, inputs, plan, thread
        self.sequence = T.Bind(T.Cast("int64", found[i64(0)]))
        start = T.Bind(inputs.start(self.sequence))
        new = T.Bind(inputs.start(self.sequence + i64(1)) - start)
        first = T.Bind(T.Cast("int64", found[i64(1)]) * i64(plan.tokens))
        self.first_row = T.Bind(start + first)
        self.count = T.Bind(T.min(new - first, i64(plan.tokens)))
        self.position = T.Bind(inputs.length(self.sequence) - new + first)
        self.first_head = T.Bind(head * i64(plan.heads))
        self.kv_head = T.Bind(quotient(self.first_head, shape.heads))
        self.across = T.Bind(remainder(thread, ACROSS))
        self.down = T.Bind(quotient(thread, ACROSS))
        self.q = shared((shape.keys.padded, plan.padded_rows))
        self.weights = shared((plan.positions, plan.padded_rows))
        self.factors = shared((plan.padded_rows,))
        self.stage = shared((plan.stage_floats,))
        self.columns = ceildiv(shape.v_head_dim, ACROSS)
        self.column_lanes = math.gcd(self.columns, 4)
        # Threads of whose rows none has a token only help to load.
        self.busy = self._row(0) < self.count * i64(plan.heads)
        self.sums = registers((plan.thread_rows, self.columns))
        # In softmax a thread has a part of one row; row r's parts are spread over the block.
        self.parts = plan.threads // plan.padded_rows
        self.partial = shared((self.parts, plan.padded_rows))
        self.row = T.Bind(remainder(thread, plan.padded_rows))
        self.part = T.Bind(quotient(thread, plan.padded_rows))
        self.highest = registers((1,))
        self.total = registers((1,))

    def emit(self) -> None:
        """Walks the context and stores the outputs."""
        shape, plan = self.shape, self.plan
        self._start()
        end = T.Bind(self.position + self.count)
        begin = i64(0)
        if shape.window is not None:
            begin = T.Bind(T.max(self.position - i64(shape.window - 1), i64(0)))
        with T.serial(quotient_up(end - begin, plan.positions)) as block:
            first = T.Bind(begin + block * i64(plan.positions))
            self._score(first, end)
            self._soften(first)
            self._weigh(first, end)
        self._store()

    def _token(self, row: Expr) -> Expr:
        return quotient(row, self.plan.heads)

    def _head(self, row: Expr) -> Expr:
        return self.first_head + remainder(row, self.plan.heads)

    def _row(self, number: int) -> Expr:
        """The thread's row of that number."""
        return _side_by_side(number, self.plan.row_lanes, self.down, self.plan.row_threads)

    def _place(self, number: int) -> Expr:
        """The thread's position of that number, within the block's."""
        return _side_by_side(number, self.plan.position_lanes, self.across, ACROSS)

    def _column(self, number: int) -> Expr:
        """The thread's feature of that number."""
        return _side_by_side(number, self.column_lanes, self.across, ACROSS)

    def _of_rows(self, buffer: Expr, line: Expr) -> list[Expr]:
        """The numbers of all the thread's rows in a line of shared memory."""
        lanes = self.plan.row_lanes
        firsts = [self._row(r) for r in range(0, self.plan.thread_rows, lanes)]
        return [v for first in firsts for v in read_vector(buffer, (line, first), lanes)]

    def _start(self) -> None:
        """Scaled queries, features first; rows without a token repeat the last one."""
        shape, plan = self.shape, self.plan
        width = shape.keys.padded
        with strided(self.thread, width * plan.padded_rows, plan.threads) as item:
            feature = T.Bind(remainder(item, width))
            row = T.Bind(quotient(item, width))
            token = T.min(self._token(row), self.count - i64(1))
            query = to_f32(self.inputs.q[i64(0), self.first_row + token, self._head(row), feature])
            query = query * f32(shape.query_scale)
            if width != shape.head_dim:
                query = T.if_then_else(feature < i64(shape.head_dim), query, f32(0))
            put(self.q, query, feature, row)
        for row in range(plan.thread_rows):
            for column in range(self.columns):
                put(self.sums, f32(0), row, column)
        put(self.highest, f32(LOWEST), 0)
        put(self.total, f32(0), 0)

    def _score(self, first: Expr, end: Expr) -> None:
        """Scores of all rows and positions, masked, into `weights`."""
        shape, plan = self.shape, self.plan
        across = plan.positions // ACROSS
        scores = registers((plan.thread_rows, across))
        for row in range(plan.thread_rows):
            for column in range(across):
                put(scores, f32(0), row, column)
        with T.serial(i64(shape.keys.padded // plan.stage_features)) as step:
            start = T.Bind(step * i64(plan.stage_features))
            sync()  # the stage is free, queries are there
            self._stage_keys(first, end, start)
            sync()
            with (
                when(T.And(self.busy, first + self._place(0) < end)),
                T.serial(i64(plan.stage_features)) as feature,
            ):
                base = T.Bind(feature * i64(plan.positions))
                keys: list[Expr] = []
                for column in range(0, across, plan.position_lanes):
                    place = (base + self._place(column),)
                    keys += read_vector(self.stage, place, plan.position_lanes)
                for row, query in enumerate(self._of_rows(self.q, start + feature)):
                    for column, key in enumerate(keys):
                        total = scores[i64(row), i64(column)] + query * key
                        put(scores, total, row, column)
        limits = [
            T.Bind(self.position + self._token(self._row(r))) for r in range(plan.thread_rows)
        ]
        for column in range(across):
            place = T.Bind(self._place(column))
            position = T.Bind(first + place)
            for row in range(0, plan.thread_rows, plan.row_lanes):
                values = [
                    self._masked(scores[i64(r), i64(column)], position, limits[r])
                    for r in range(row, row + plan.row_lanes)
                ]
                write_vector(self.weights, (place, self._row(row)), values)
        sync()

    def _masked(self, score: Expr, position: Expr, limit: Expr) -> Expr:
        """The score of a row that sees positions up to `limit`."""
        seen = position <= limit
        if self.shape.window is not None:
            seen = T.And(seen, position > limit - i64(self.shape.window))
        return T.if_then_else(seen, self.shape.capped(score), f32(LOWEST))

    def _shares(self, total: int, body: Callable[[Expr], None]) -> None:
        with strided(self.thread, total, self.plan.threads) as item:
            body(item)

    def _stage_keys(self, first: Expr, end: Expr, start: Expr) -> None:
        """`stage_features` features of the block's keys, features first; zeros past the end."""
        shape, plan, keys = self.shape, self.plan, self.shape.keys
        lanes = 4
        position_count = i64(plan.positions)

        def load(item: Expr) -> None:
            place = T.Bind(T.floormod(item, position_count))
            within = T.Bind(T.floordiv(item, position_count) * i64(lanes))
            position = T.Bind(first + place)
            at = T.Bind(within * position_count + place)
            with T.If(position < end):
                with T.Then():
                    page = T.Bind(self.inputs.page(shape, self.sequence, position))
                    offset = T.Bind(remainder(position, shape.page_size))
                    source = T.Bind(keys.place(offset, T.Bind(start + within)))
                    pages = self.inputs.k_pages
                    key = keys.load(pages, page, self.kv_head, source, lanes)
                    scale = keys.load_scale(pages, page, self.kv_head, offset)
                    for lane, value in enumerate(key):
                        value = value * scale if shape.kv.scaled else value
                        put(self.stage, value, at + i64(lane * plan.positions))
                with T.Else():
                    for lane in range(lanes):
                        put(self.stage, f32(0), at + i64(lane * plan.positions))

        self._shares(plan.stage_features // lanes * plan.positions, load)

    def _soften(self, first: Expr) -> None:
        """Scores to weights 2^(score - the row's highest); earlier sums are scaled to it."""
        plan, row = self.plan, self.row
        share = ceildiv(plan.positions, self.parts)
        active = self.thread < i64(self.parts * plan.padded_rows)
        with when(active):
            value = registers((1,))
            put(value, f32(LOWEST), 0)
            self._row_part(
                share, lambda at: put(value, T.max(value[i64(0)], self.weights[at, row]), 0)
            )
            put(self.partial, value[i64(0)], self.part, row)
        sync()
        with when(active):
            before = T.Bind(self.highest[i64(0)])
            largest = before
            for part in range(self.parts):
                largest = T.max(largest, self.partial[i64(part), row])
            highest = T.Bind(largest)
            factor = T.Bind(T.exp2(before - highest))
            put(self.highest, highest, 0)
            put(self.total, self.total[i64(0)] * factor, 0)

            def weigh(at: Expr) -> None:
                # A score of LOWEST gives no weight, even where the row has seen nothing yet.
                score = T.Bind(self.weights[at, row])
                weight = T.exp2(score - highest)
                weight = T.Bind(T.if_then_else(score > f32(LOWEST), weight, f32(0)))
                put(self.weights, weight, at, row)
                put(self.total, self.total[i64(0)] + weight, 0)

            self._row_part(share, weigh)
            with when(self.part == i64(0)):
                put(self.factors, factor, row)
        sync()
        for number in range(plan.thread_rows):
            factor = T.Bind(self.factors[self._row(number)])
            for column in range(self.columns):
                put(self.sums, self.sums[i64(number), i64(column)] * factor, number, column)

    def _row_part(self, share: int, body: Callable[[Expr], None]) -> None:
        """body(the row's positions that are this thread's)."""
        parts, positions = self.parts, self.plan.positions
        with T.serial(i64(share)) as i:
            number = T.Bind(i * i64(parts) + self.part)
            if share * parts == positions:
                body(number)
            else:
                with when(number < i64(positions)):
                    body(number)

    def _weigh(self, first: Expr, end: Expr) -> None:
        """Adds the weighted values of the block's positions."""
        plan = self.plan
        padded = self.columns * ACROSS
        with T.serial(i64(ceildiv(plan.positions, plan.stage_positions))) as step:
            start = T.Bind(step * i64(plan.stage_positions))
            with when(first + start < end):
                self._stage_values(first + start, end)
            sync()
            count = T.min(i64(plan.positions) - start, i64(plan.stage_positions))
            seen = T.max(T.min(count, end - first - start), i64(0))
            with when(self.busy), T.serial(seen) as place:
                base = T.Bind(place * i64(padded))
                values: list[Expr] = []
                for column in range(0, self.columns, self.column_lanes):
                    at = (base + self._column(column),)
                    values += read_vector(self.stage, at, self.column_lanes)
                for row, weight in enumerate(self._of_rows(self.weights, start + place)):
                    for column, value in enumerate(values):
                        total = self.sums[i64(row), i64(column)] + weight * value
                        put(self.sums, total, row, column)
            sync()

    def _stage_values(self, first: Expr, end: Expr) -> None:
        """Values of `stage_positions` positions, zeros past the end and behind the features."""
        shape, plan, values = self.shape, self.plan, self.shape.values
        padded = self.columns * ACROSS
        lanes = 4 if shape.v_head_dim % 4 == 0 else 1

        def load(item: Expr) -> None:
            place = T.Bind(quotient(item, padded // lanes))
            feature = T.Bind(remainder(item, padded // lanes) * i64(lanes))
            position = T.Bind(first + place)
            at = T.Bind(place * i64(padded) + feature)
            inside = position < end
            if padded != shape.v_head_dim:
                inside = T.And(inside, feature < i64(shape.v_head_dim))
            with T.If(inside):
                with T.Then():
                    page = T.Bind(self.inputs.page(shape, self.sequence, position))
                    offset = T.Bind(remainder(position, shape.page_size))
                    source = T.Bind(values.place(offset, feature))
                    pages = self.inputs.v_pages
                    loaded = values.load(pages, page, self.kv_head, source, lanes)
                    scale = values.load_scale(pages, page, self.kv_head, offset)
                    for lane, value in enumerate(loaded):
                        value = value * scale if shape.kv.scaled else value
                        put(self.stage, value, at + i64(lane))
                with T.Else():
                    for lane in range(lanes):
                        put(self.stage, f32(0), at + i64(lane))

        self._shares(plan.stage_positions * padded // lanes, load)

    def _store(self) -> None:
        """Divides by the rows' sums of weights and stores."""
        shape, plan, row = self.shape, self.plan, self.row
        active = self.thread < i64(self.parts * plan.padded_rows)
        with when(active):
            put(self.partial, self.total[i64(0)], self.part, row)
        sync()
        with when(T.And(active, self.part == i64(0))):
            total = self.partial[i64(0), row]
            for part in range(1, self.parts):
                total = total + self.partial[i64(part), row]
            factor: Expr = f32(1)
            if self.inputs.sinks is not None:
                sink = T.Bind(self.inputs.sink(self._head(row)))
                highest = T.Bind(T.max(self.highest[i64(0)], sink))
                factor = T.Bind(T.exp2(self.highest[i64(0)] - highest))
                total = total * factor + T.exp2(sink - highest)
            put(self.factors, factor / total, row)
        sync()
        for number in range(plan.thread_rows):
            own = T.Bind(self._row(number))
            token = T.Bind(self._token(own))
            inside = token < self.count
            if plan.padded_rows != plan.rows:
                inside = T.And(inside, own < i64(plan.rows))
            with when(inside):
                factor = T.Bind(self.factors[own])
                for column in range(self.columns):
                    feature = T.Bind(self._column(column))
                    value = self.sums[i64(number), i64(column)] * factor
                    at = (0, self.first_row + token, self._head(own), feature)
                    if self.columns * ACROSS == shape.v_head_dim:
                        put(self.inputs.out, value, *at)
                    else:
                        with when(feature < i64(shape.v_head_dim)):
                            put(self.inputs.out, value, *at)
