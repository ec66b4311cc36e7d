"""Attention of single new tokens: a block for each sequence, tile of query heads and part of the
context.

The block walks the context in steps of `positions`. A thread scores positions of its own for all
heads of the tile, so that a key is read once; softmax is online in float32 (Dao et al., 2022) with
powers of two; then threads lie across the features of V, several positions at a time.

Where a context is cut into parts (flash-decoding, Dao et al., 2023), each leaves its sums, its
weights' total and its highest score in memory, and a second launch brings them together: a kernel
of its own, because blocks of one launch cannot wait for each other.

Masked scores are LOWEST, which is finite. V is never read where the token does not see, so that
stale pages cannot put a NaN in.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import f32, i64, put, registers, to_f32, when
from llmc.targets.gpu.kernels.attention_inputs import Inputs, Shape
from llmc.targets.gpu.kernels.attention_plans import DecodePlan
from llmc.targets.gpu.kernels.block import (
    LOWEST,
    add,
    launch,
    maximum,
    quotient,
    quotient_up,
    reduce_all,
    remainder,
    shared,
    strided,
    sync,
    when_all,
    workspace,
)
from llmc.targets.gpu.layout import ceildiv

Expr = Any


def decode(shape: Shape, inputs: Inputs, plan: DecodePlan) -> None:
    """Emits the launches for all sequences with one new token."""
    tiles = shape.num_kv_heads * shape.heads // plan.heads
    partial = None
    if plan.parts > 1:
        heads = shape.num_kv_heads * shape.heads
        # Behind a part's sums stand its total and its highest score.
        partial = workspace((inputs.sequences, heads, plan.parts, shape.v_head_dim + 2))
    with launch((inputs.sequences, tiles, plan.parts), (plan.threads,)) as (
        sequence,
        tile,
        part,
        thread,
    ):
        row = T.Bind(inputs.start(sequence))
        with when_all(_is_decode(inputs, sequence, row)):
            _Decode(shape, inputs, plan, sequence, row, tile, part, thread, partial).emit()
    if partial is not None:
        _merge(shape, inputs, plan, partial)


def _is_decode(inputs: Inputs, sequence: Expr, row: Expr) -> Expr:
    return inputs.start(sequence + i64(1)) - row == i64(1)


def _with_sink(inputs: Inputs, head: Expr, highest: Expr, total: Expr) -> tuple[Expr, Expr]:
    """(factor of the sums, total) once the head's sink, if there is one, has joined the softmax."""
    if inputs.sinks is None:
        return f32(1), total
    sink = T.Bind(inputs.sink(head))
    above = T.Bind(T.max(highest, sink))
    factor = T.Bind(T.exp2(highest - above))
    return factor, total * factor + T.exp2(sink - above)


def _merge(shape: Shape, inputs: Inputs, plan: DecodePlan, partial: Expr) -> None:
    """Scales the parts' sums to the highest score of all and divides by the total."""
    width, threads = shape.v_head_dim, 32
    heads = shape.num_kv_heads * shape.heads
    with launch((inputs.sequences, heads), (threads,)) as (sequence, head, thread):
        row = T.Bind(inputs.start(sequence))
        with when(_is_decode(inputs, sequence, row)):
            parts = [(sequence, head, i64(part)) for part in range(plan.parts)]
            scores = [T.Bind(partial[(*at, i64(width + 1))]) for at in parts]
            highest = scores[0]
            for score in scores[1:]:
                highest = T.max(highest, score)
            highest = T.Bind(highest)
            factors = [T.Bind(T.exp2(score - highest)) for score in scores]
            total: Expr = f32(0)
            for at, factor in zip(parts, factors, strict=True):
                total = total + partial[(*at, i64(width))] * factor
            scale, total = _with_sink(inputs, head, highest, T.Bind(total))
            inverse = T.Bind(scale / total)
            with strided(thread, width, threads) as feature:
                value: Expr = f32(0)
                for at, factor in zip(parts, factors, strict=True):
                    value = value + partial[(*at, feature)] * factor
                put(inputs.out, value * inverse, 0, row, head, feature)


class _Decode:
    """One block's token and heads."""

    def __init__(
        self,
        shape: Shape,
        inputs: Inputs,
        plan: DecodePlan,
        sequence: Expr,
        row: Expr,
        tile: Expr,
        part: Expr,
        thread: Expr,
        partial: Expr | None,
    ) -> None:
        self.shape, self.inputs, self.plan = shape, inputs, plan
        self.sequence, self.row, self.part, self.thread = sequence, row, part, thread
        self.partial = partial
        self.first_head = T.Bind(tile * i64(plan.heads))
        self.kv_head = T.Bind(quotient(self.first_head, shape.heads))
        self.q = shared((plan.heads, shape.keys.padded))
        self.weights = shared((plan.heads, plan.positions))
        # Where a position lies: its page times the page size, plus its place in the page.
        self.slots = shared((plan.positions,), "int32")
        self.highest = registers((plan.heads,))
        self.totals = registers((plan.heads,))
        self.sums = registers((plan.heads, plan.lanes))
        columns = shape.v_head_dim // plan.lanes
        self.groups = plan.threads // columns
        self.column = T.Bind(remainder(thread, columns) * i64(plan.lanes))
        self.group = T.Bind(quotient(thread, columns))

    def emit(self) -> None:
        """Walks the context and stores the outputs."""
        shape, plan = self.shape, self.plan
        self._load_queries()
        end = T.Bind(self.inputs.length(self.sequence))
        begin = i64(0)
        if shape.window is not None:
            begin = T.Bind(T.max(end - i64(shape.window), i64(0)))
        if plan.parts > 1:
            share = T.Bind(quotient_up(end - begin, plan.parts))
            begin = T.Bind(begin + self.part * share)
            # The last parts of a short context are empty.
            end = T.Bind(T.max(T.min(begin + share, end), begin))
        with T.serial(quotient_up(end - begin, plan.positions)) as block:
            first = T.Bind(begin + block * i64(plan.positions))
            count = T.Bind(T.min(end - first, i64(plan.positions)))
            self._score(first, end)
            sync()
            self._weigh(count)
            sync()
        self._store()

    def _load_queries(self) -> None:
        shape, plan = self.shape, self.plan
        width = shape.keys.padded
        with strided(self.thread, plan.heads * width, plan.threads) as item:
            head = T.Bind(quotient(item, width))
            feature = T.Bind(remainder(item, width))
            query = to_f32(self.inputs.q[i64(0), self.row, self.first_head + head, feature])
            query = query * f32(shape.query_scale)
            if width != shape.head_dim:
                query = T.if_then_else(feature < i64(shape.head_dim), query, f32(0))
            put(self.q, query, head, feature)
        for head in range(plan.heads):
            put(self.highest, f32(LOWEST), head)
            put(self.totals, f32(0), head)
            for lane in range(plan.lanes):
                put(self.sums, f32(0), head, lane)
        sync()

    def _score(self, first: Expr, end: Expr) -> None:
        """Scores the thread's positions, then turns them into weights for all to see."""
        shape, plan = self.shape, self.plan
        scores = registers((plan.steps, plan.heads))
        for step in range(plan.steps):
            position = T.Bind(first + i64(step * plan.threads) + self.thread)
            for head in range(plan.heads):
                put(scores, f32(LOWEST), step, head)
            with when(position < end):
                page = T.Bind(self.inputs.page(shape, self.sequence, position))
                offset = T.Bind(remainder(position, shape.page_size))
                slot = page * i64(shape.page_size) + offset
                put(self.slots, slot, i64(step * plan.threads) + self.thread)
                self._dot(scores, step, page, offset)
        largest = []
        for head in range(plan.heads):
            value = scores[i64(0), i64(head)]
            for step in range(1, plan.steps):
                value = T.max(value, scores[i64(step), i64(head)])
            largest.append(T.Bind(value))
        whole = reduce_all(largest, maximum, self.thread, plan.threads, plan.features)
        for head, value in enumerate(whole):
            before = T.Bind(self.highest[i64(head)])
            highest = T.Bind(T.max(before, value))
            factor = T.Bind(T.exp2(before - highest))
            put(self.highest, highest, head)
            put(self.totals, self.totals[i64(head)] * factor, head)
            for lane in range(plan.lanes):
                put(self.sums, self.sums[i64(head), i64(lane)] * factor, head, lane)
            for step in range(plan.steps):
                position = i64(step * plan.threads) + self.thread
                weight = T.exp2(scores[i64(step), i64(head)] - highest)
                weight = T.Bind(T.if_then_else(first + position < end, weight, f32(0)))
                put(self.totals, self.totals[i64(head)] + weight, head)
                put(self.weights, weight, head, position)

    def _dot(self, scores: Expr, step: int, page: Expr, offset: Expr) -> None:
        """One key times the queries of all heads."""
        shape, plan = self.shape, self.plan
        keys, lanes = shape.keys, 4
        totals = registers((plan.heads,))
        for head in range(plan.heads):
            put(totals, f32(0), head)
        with T.serial(i64(keys.padded // keys.vector)) as vector:
            for part in range(keys.vector // lanes):
                feature = T.Bind(vector * i64(keys.vector) + i64(part * lanes))
                place = T.Bind(
                    (vector * i64(shape.page_size) + offset) * i64(keys.vector) + i64(part * lanes)
                )
                key = keys.load(self.inputs.k_pages, page, self.kv_head, place, lanes)
                for head in range(plan.heads):
                    total = totals[i64(head)]
                    for lane, value in enumerate(key):
                        total = total + value * self.q[i64(head), feature + i64(lane)]
                    put(totals, total, head)
        factor = keys.load_scale(self.inputs.k_pages, page, self.kv_head, offset)
        for head in range(plan.heads):
            total = totals[i64(head)]
            total = total * factor if shape.kv.scaled else total
            put(scores, shape.capped(total), step, head)

    def _weigh(self, count: Expr) -> None:
        """Adds the weighted values: each group of threads takes every groups-th position."""
        shape, plan, values = self.shape, self.plan, self.shape.values
        with when(self.group < i64(self.groups)), T.serial(quotient_up(count, self.groups)) as i:
            position = T.Bind(i * i64(self.groups) + self.group)
            with when(position < count):
                slot = T.Bind(T.Cast("int64", self.slots[position]))
                page = T.Bind(quotient(slot, shape.page_size))
                offset = T.Bind(remainder(slot, shape.page_size))
                place = T.Bind(values.place(offset, self.column))
                pages = self.inputs.v_pages
                loaded = values.load(pages, page, self.kv_head, place, plan.lanes)
                scale = values.load_scale(pages, page, self.kv_head, offset)
                for head in range(plan.heads):
                    weight = self.weights[i64(head), position]
                    weight = T.Bind(weight * scale if shape.kv.scaled else weight)
                    for lane, value in enumerate(loaded):
                        total = self.sums[i64(head), i64(lane)] + weight * value
                        put(self.sums, total, head, lane)

    def _store(self) -> None:
        """Brings the groups' sums together; divides by the weights' sum, or leaves both."""
        shape, plan = self.shape, self.plan
        totals = [T.Bind(self.totals[i64(h)]) for h in range(plan.heads)]
        totals = reduce_all(totals, add, self.thread, plan.threads, plan.features)
        groups = shared((self.groups, shape.v_head_dim))
        for head, total in enumerate(totals):
            number = T.Bind(self.first_head + i64(head))
            highest = T.Bind(self.highest[i64(head)])
            with when(self.group < i64(self.groups)):
                for lane in range(plan.lanes):
                    value = self.sums[i64(head), i64(lane)]
                    put(groups, value, self.group, self.column + i64(lane))
            sync()
            if self.partial is None:
                factor, total = _with_sink(self.inputs, number, highest, total)
                inverse = T.Bind(factor / total)
            with strided(self.thread, shape.v_head_dim, plan.threads) as feature:
                value = groups[i64(0), feature]
                for group in range(1, self.groups):
                    value = value + groups[i64(group), feature]
                if self.partial is None:
                    put(self.inputs.out, value * inverse, 0, self.row, number, feature)
                else:
                    put(self.partial, value, self.sequence, number, self.part, feature)
            if self.partial is not None:
                at = (self.sequence, number, self.part)
                with when(self.thread == i64(0)):
                    put(self.partial, total, *at, shape.v_head_dim)
                    put(self.partial, highest, *at, shape.v_head_dim + 1)
            sync()
