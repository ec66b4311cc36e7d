"""What every attention kernel reads: a batch's buffers, and the pages of one sequence's context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels.attention_tile import Plan
from llmc.targets.cpu.kernels.kv_pages import PageMatrix
from llmc.targets.cpu.kernels.vector import at, named, spread

Expr = Any


@dataclass(frozen=True, slots=True)
class Inputs:
    """The kernel's buffers that a tile reads."""

    q: Expr  # [1, T, H, D] f32
    tables: Expr  # [G, S, B] i32
    k_pages: Expr  # [P, Kv, elements]
    v_pages: Expr


@dataclass(frozen=True, slots=True)
class Work:
    """Which part of the batch a tile is: all int64, `position` int32."""

    seq: Expr
    head: Expr
    first_row: Expr  # of the packed axis
    num_tokens: Expr
    position: Expr  # of the first token
    begin: Expr  # pages of the context
    end: Expr


class ContextPages:
    """The pages that a tile reads.

    A number past the last page of the part stands for the last one: what it gives is loaded, never
    used. `num_seen` tokens of the context are visible to the tile's last one.
    """

    def __init__(self, plan: Plan, inputs: Inputs, work: Work) -> None:
        self._plan, self._inputs, self._work = plan, inputs, work
        self.num_seen = named(T.Cast("int64", work.position) + work.num_tokens)

    def page(self, number: Expr) -> Expr:
        """Where the context's page `number` is."""
        number = T.min(number, self._work.end - i64(1))
        page = self._inputs.tables[i64(self._plan.group), self._work.seq, number]
        return named(T.Cast("int64", page))

    def keys(self, page: Expr) -> PageMatrix:
        """The tile's head's keys in it."""
        return self._plan.keys.within(self._inputs.k_pages, page, self._work.head)

    def values(self, page: Expr) -> PageMatrix:
        """And values."""
        return self._plan.values.within(self._inputs.v_pages, page, self._work.head)

    def load_scales(self, first: Expr, k_scales: Expr, v_scales: Expr) -> None:
        """Scales from page `first` on, as many as the buffers hold; V's are zero where nothing has
        been written.
        """
        plan = self._plan
        lanes, n = plan.page_lanes, plan.page_size
        with T.serial(i64(int(k_scales.shape[0]) // lanes)) as c:
            number = named(first + T.floordiv(c * i64(lanes), i64(n)))
            page = self.page(number)
            column = T.Bind(T.floormod(c * i64(lanes), i64(n)))
            where = [at(c * i64(lanes), lanes)]
            T.buffer_store(k_scales, self.keys(page).scales(column, lanes), where)
            left = T.Cast("int32", self.num_seen - number * i64(n) - column)
            seen = T.ramp(T.int32(0), T.int32(1), lanes) < spread(left, lanes)
            scales = self.values(page).scales(column, lanes)
            scales = T.Select(seen, scales, spread(T.float32(0), lanes))
            T.buffer_store(v_scales, scales, where)


def masked(plan: Plan, score: Expr, distance: Expr) -> Expr:
    """-inf in the lanes that a query `distance` tokens behind the first lane does not see."""
    lanes = plan.page_lanes
    index = T.ramp(T.int32(0), T.int32(1), lanes)
    hidden = spread(-T.infinity("float32"), lanes)
    score = T.Select(index <= spread(distance, lanes), score, hidden)
    if plan.window is not None:
        passed = spread(distance - T.int32(plan.window), lanes)
        score = T.Select(index > passed, score, hidden)
    return score
