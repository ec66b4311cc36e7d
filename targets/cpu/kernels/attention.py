"""Paged attention for CPUs: one kernel for prefill chunks, decodes and any mixture of them.

A work item is a tile (a few new tokens of one sequence), one K/V head and a part of the context;
attention_block.py says how it is done. Here is how a ragged batch becomes work items, and how the
parts of one context come together again (flash-decoding, Dao et al., 2023).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.errors import UnsupportedError
from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels import bfloat16
from llmc.targets.cpu.kernels.attention_block import TileAttention
from llmc.targets.cpu.kernels.attention_matrix import MatrixAttention
from llmc.targets.cpu.kernels.attention_pages import Inputs, Work
from llmc.targets.cpu.kernels.attention_tile import (
    LOG2E,
    AttentionTuning,
    MatrixTile,
    Plan,
    Tile,
)
from llmc.targets.cpu.kernels.kv_pages import kv_type
from llmc.targets.cpu.kernels.math import exp2, lane_sum
from llmc.targets.cpu.kernels.panels import scratch
from llmc.targets.cpu.kernels.vector import at, named, registers, spread

__all__ = ["AttentionTuning", "paged_attention"]

Expr = Any

# Columns of the table of work items.
SEQUENCE, FIRST_TOKEN, NUM_TOKENS, BEGIN, END, SLOT, NUM_COLUMNS = range(7)
# Columns of the table of split tiles.
ROW, TOKENS, FIRST_SLOT, NUM_PARTS, NUM_SPLIT_COLUMNS = range(5)
NO_SLOT = -1


def paged_attention(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    kv_dtype: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    group: int,
    num_groups: int,
    tokens: int | None = None,
    tuning: AttentionTuning | None = None,
) -> PrimFunc:
    """Attention of new tokens over their sequences' pages, causal.

    Buffers in order: q `[1, T, H, D]` f32, q_starts `[S+1]` i32, kv_lens `[S]` i32, block_tables
    `[G, S, B]` i32, k_pages and v_pages `[P, Kv, elements]` (kv_dtype, see kv_pages.py), sinks
    `[H]` f32 (only with `sinks`), out `[1, T, H, Dv]` f32. docs/shapes.md explains the ragged
    batch; rows from `q_starts[S]` on are not written.

    A position i sees j with i - window < j <= i; pages wholly outside are not read, nor are their
    table entries. `softcap` replaces a score s by softcap · tanh(s / softcap). A sink is one more
    logit of its head, whose probability is dropped. `tokens` is T where it is fixed. Raises
    UnsupportedError where the heads do not divide, the page size is no multiple of 8, or the KV
    type is unknown or does not fit the head size.
    """
    if num_heads % num_kv_heads:
        raise UnsupportedError(
            f"attention with {num_heads} query heads over {num_kv_heads} K/V heads: "
            "the first must be a multiple of the second"
        )
    plan = Plan(
        num_kv_heads=num_kv_heads,
        heads=num_heads // num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_size=page_size,
        kv=kv_type(kv_dtype, page_size, head_dim),
        scale=scale,
        window=window,
        softcap=softcap,
        group=group,
        tuning=tuning or AttentionTuning(),
    )
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("paged_attention")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            _body(plan, num_groups, tokens, sinks)
    return builder.get()


def _body(plan: Plan, num_groups: int, tokens: int | None, sinks: bool) -> None:
    rows = size_var("num_tokens") if tokens is None else i64(tokens)
    sequences, blocks, pages = (size_var(name) for name in ("sequences", "blocks", "pages"))
    num_heads = plan.num_kv_heads * plan.heads
    q = argument("q", (1, rows, num_heads, plan.head_dim))
    q_starts = argument("q_starts", (sequences + i64(1),), "int32")
    kv_lens = argument("kv_lens", (sequences,), "int32")
    tables = argument("block_tables", (num_groups, sequences, blocks), "int32")
    k_pages = argument("k_pages", (pages, plan.num_kv_heads, plan.keys.elements), plan.kv.dtype)
    v_pages = argument("v_pages", (pages, plan.num_kv_heads, plan.values.elements), plan.kv.dtype)
    sink_logits = argument("sinks", (num_heads,)) if sinks else None
    out = argument("out", (1, rows, num_heads, plan.v_head_dim))
    kernel = _Kernel(
        plan=plan,
        inputs=Inputs(q, tables, k_pages, v_pages),
        q_starts=q_starts,
        kv_lens=kv_lens,
        rows=rows,
        sequences=sequences,
        sinks=sink_logits,
        out=out,
        one=plan.tile(1),
        many=plan.many(tokens),
    )
    with ExitStack() as scopes:
        dot = any(isinstance(t, Tile) and t.bf16 for t in (kernel.one, kernel.many))
        if dot:
            scopes.enter_context(bfloat16.with_dot())
        if dot or isinstance(kernel.many, MatrixTile):
            scopes.enter_context(bfloat16.with_rounding())
        kernel.emit()


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """Finished parts of split contexts: slot · rows + row is the first index of all three."""

    highest: Expr  # [slots · rows]
    totals: Expr  # [slots · rows, page_lanes]
    sums: Expr  # [slots · rows, Dv]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """The arguments of one kernel under construction; `many` is the tile of several tokens."""

    plan: Plan
    inputs: Inputs
    q_starts: Expr
    kv_lens: Expr
    rows: Expr  # T
    sequences: Expr  # S
    sinks: Expr | None
    out: Expr
    one: Tile
    many: Tile | MatrixTile

    def emit(self) -> None:
        """The whole kernel."""
        plan = self.plan
        kv_heads, max_splits = i64(plan.num_kv_heads), plan.max_splits
        # Pages of a head, items, slots, split tiles, tiles of several tokens.
        counts = scratch((5,), "int64")
        for index in range(5):
            T.buffer_store(counts, i64(0), [i64(index)])
        tokens = i64(self.many.tokens)
        max_tiles = T.floordiv(self.rows, tokens) + self.sequences
        items = scratch((max_tiles + i64(max_splits), NUM_COLUMNS), "int64")
        splits = scratch((max_splits, NUM_SPLIT_COLUMNS), "int64")
        slots = plan.num_kv_heads * max_splits * self.many.rows
        state = _State(
            highest=scratch((slots,)),
            totals=scratch((slots, plan.page_lanes)),
            sums=scratch((slots, plan.v_head_dim)),
        )
        self._cut(counts, items, splits)
        num_items = named(counts[i64(1)])
        all_items = named(num_items * kv_heads)

        def work(index: Expr, mixed: bool) -> None:
            # Neighbours come from both ends, because the late tiles of a prompt see more tokens
            # than the early ones.
            rank = named(T.floordiv(index, kv_heads))
            half = T.floordiv(rank, i64(2))
            back = num_items - i64(1) - half
            item = named(T.Select(T.floormod(rank, i64(2)) == i64(0), half, back))
            self._attend(items, item, named(T.floormod(index, kv_heads)), state, mixed)

        # A short context is one task of the same loop.
        short = counts[i64(0)] * kv_heads <= i64(plan.serial_pages)
        num_tasks = named(T.Select(short, T.min(all_items, i64(1)), all_items))
        items_per_task = named(T.Select(short, all_items, i64(1)))

        def each(mixed: bool) -> None:
            with T.parallel(num_tasks) as task, T.serial(items_per_task) as turn:
                work(named(task + turn), mixed)

        if self.many.tokens == 1:
            each(mixed=False)
        else:
            # Beside tiles of several tokens LLVM runs out of registers for those of one.
            with T.If(counts[i64(4)] == i64(0)):
                with T.Then():
                    each(mixed=False)
                with T.Else():
                    each(mixed=True)
        with T.If(counts[i64(3)] > i64(0)), T.Then():
            with T.parallel(T.Bind(counts[i64(3)] * kv_heads)) as index:
                split = named(T.floordiv(index, kv_heads))
                self._merge(splits, split, named(T.floormod(index, kv_heads)), state)

    # Cutting the batch.

    def _count(self, sequence: Expr) -> Expr:
        return T.Cast("int64", self.q_starts[sequence])

    def _each_tile(self, counts: Expr, action: Any) -> None:
        """action(seq, first token, tokens, begin, end) for every tile of the batch, in order."""
        plan, tokens, n = self.plan, i64(self.many.tokens), i64(self.plan.page_size)
        with T.serial(self.sequences) as seq:
            length = named(self._count(seq + i64(1)) - self._count(seq))
            with T.serial(T.ceildiv(length, tokens)) as tile:
                first = T.Bind(tile * tokens)
                count = named(T.min(tokens, length - first))
                position = named(T.Cast("int64", self.kv_lens[seq]) - length + first)
                begin: Expr = i64(0)
                if plan.window is not None:
                    oldest = T.max(position - i64(plan.window - 1), i64(0))
                    begin = named(T.floordiv(oldest, n))
                end = named(T.floordiv(position + count - i64(1), n) + i64(1))
                action(seq, first, count, begin, end)

    def _cut(self, counts: Expr, items: Expr, splits: Expr) -> None:
        """Fills the tables: a context longer than a fair share of all pages becomes parts."""
        plan = self.plan

        def bump(index: int, by: Expr) -> None:
            T.buffer_store(counts, counts[i64(index)] + by, [i64(index)])

        self._each_tile(counts, lambda seq, first, count, begin, end: bump(0, end - begin))
        fair = T.ceildiv(counts[i64(0)] * i64(plan.num_kv_heads), i64(plan.tuning.work_items))
        share = named(T.max(fair, i64(plan.part_pages)))

        def record(seq: Expr, first: Expr, count: Expr, begin: Expr, end: Expr) -> None:
            wanted = named(T.ceildiv(end - begin, share))
            unit = i64(plan.unit_pages)
            size = named(T.ceildiv(T.ceildiv(end - begin, wanted), unit) * unit)
            parts = named(T.ceildiv(end - begin, size))
            with T.If(count > i64(1)), T.Then():
                bump(4, i64(1))
            with T.If(parts > i64(1)), T.Then():
                split = [self._count(seq) + first, count, counts[i64(2)], parts]
                for column, value in enumerate(split):
                    T.buffer_store(splits, value, [counts[i64(3)], i64(column)])
                bump(3, i64(1))
            with T.serial(parts) as part:
                start = T.Bind(begin + part * size)
                slot = T.Select(parts > i64(1), counts[i64(2)], i64(NO_SLOT))
                item = [seq, first, count, start, T.min(start + size, end), slot]
                for column, value in enumerate(item):
                    T.buffer_store(items, value, [counts[i64(1)], i64(column)])
                bump(1, i64(1))
                with T.If(parts > i64(1)), T.Then():
                    bump(2, i64(1))

        self._each_tile(counts, record)

    # Doing the work.

    def _attend(self, items: Expr, item: Expr, head: Expr, state: _State, mixed: bool) -> None:
        """One work item: its outputs, or its state where there are other parts; of one token where
        they are not `mixed`.
        """
        seq, first, count, begin, end, slot = (
            named(items[item, i64(column)]) for column in range(NUM_COLUMNS)
        )
        length = self._count(seq + i64(1)) - self._count(seq)
        position = named(T.Cast("int32", T.Cast("int64", self.kv_lens[seq]) - length + first))
        work = Work(
            seq=seq,
            head=head,
            first_row=named(self._count(seq) + first),
            num_tokens=count,
            position=position,
            begin=begin,
            end=end,
        )

        def attend(tile: Tile | MatrixTile) -> None:
            kind = TileAttention if isinstance(tile, Tile) else MatrixAttention
            attention = kind(self.plan, tile, self.inputs, work)
            attention.run()
            done = _State(highest=attention.highest, totals=attention.totals, sums=attention.sums)
            with T.If(slot == i64(NO_SLOT)):
                with T.Then():
                    self._write(done, i64(0), head, work.first_row, count)
                with T.Else():
                    self._keep(done, state, self._base(head, slot), count)

        if not mixed:
            attend(self.one)
            return
        with T.If(count == i64(1)):
            with T.Then():
                attend(self.one)
            with T.Else():
                attend(self.many)

    def _base(self, head: Expr, slot: Expr) -> Expr:
        """The first row of a slot in the buffers of finished parts."""
        return named((head * i64(self.plan.max_splits) + slot) * i64(self.many.rows))

    def _keep(self, done: _State, state: _State, base: Expr, count: Expr) -> None:
        plan = self.plan
        lanes = plan.page_lanes
        with T.serial(count * i64(plan.heads)) as row:
            to = T.Bind(base + row)
            T.buffer_store(state.highest, done.highest[row], [to])
            all_lanes = at(i64(0), lanes)
            T.buffer_store(state.totals, done.totals[row, all_lanes], [to, all_lanes])
            with T.serial(i64(plan.v_head_dim // plan.value_lanes)) as c:
                column = at(c * i64(plan.value_lanes), plan.value_lanes)
                T.buffer_store(state.sums, done.sums[row, column], [to, column])

    def _merge(self, splits: Expr, split: Expr, head: Expr, state: _State) -> None:
        """Adds the parts of one tile and head to the first of them, and writes its outputs."""
        plan = self.plan
        first_row, count, first_slot, parts = (
            named(splits[split, i64(column)]) for column in range(NUM_SPLIT_COLUMNS)
        )
        base = self._base(head, first_slot)
        with T.serial(parts - i64(1)) as part, T.serial(count * i64(plan.heads)) as row:
            into = T.Bind(base + row)
            other = T.Bind(into + (part + i64(1)) * i64(self.many.rows))
            highest = T.Bind(T.max(state.highest[into], state.highest[other]))
            weights = registers(2)
            for index, source in enumerate((into, other)):
                T.buffer_store(weights, exp2(state.highest[source] - highest), [i64(index)])
            T.buffer_store(state.highest, highest, [into])
            for buffer, size, lanes in (
                (state.totals, plan.page_lanes, plan.page_lanes),
                (state.sums, plan.v_head_dim, plan.value_lanes),
            ):
                with T.serial(i64(size // lanes)) as c:
                    column = at(c * i64(lanes), lanes)
                    total = buffer[into, column] * spread(weights[i64(0)], lanes)
                    total = total + buffer[other, column] * spread(weights[i64(1)], lanes)
                    T.buffer_store(buffer, total, [into, column])
        self._write(state, base, head, first_row, count)

    def _write(self, done: _State, base: Expr, head: Expr, first_row: Expr, count: Expr) -> None:
        """Outputs of finished rows: sums / (totals + the sink's weight)."""
        plan = self.plan
        lanes = plan.value_lanes
        with T.serial(count * i64(plan.heads)) as row:
            source = T.Bind(base + row)
            query_head = T.Bind(head * i64(plan.heads) + T.floormod(row, i64(plan.heads)))
            token = T.Bind(first_row + T.floordiv(row, i64(plan.heads)))
            total = lane_sum(done.totals[source, at(i64(0), plan.page_lanes)])
            if self.sinks is not None:
                sink = self.sinks[query_head] * T.float32(LOG2E)
                total = total + exp2(T.min(sink - done.highest[source], T.float32(127)))
            share = registers(1)
            T.buffer_store(share, T.float32(1) / total, [i64(0)])
            with T.serial(i64(plan.v_head_dim // lanes)) as c:
                column = at(c * i64(lanes), lanes)
                value = done.sums[source, column] * spread(share[i64(0)], lanes)
                T.buffer_store(self.out, value, [i64(0), token, query_head, column])
