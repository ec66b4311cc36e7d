"""Products of quantized activations in matrix registers, as bytes.

A tile product of bytes takes as long as one of bfloat16 and is twice as deep. It sums up whole
numbers, so all features of a chunk share a scale: weights (byte_panels.py) and activations
(byte_rows.py) are brought to it from their groups' own scales and rounded to bytes again. What that
would cost most of its bits, features with outlying activations, is multiplied in bfloat16 besides.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.byte_panels import BytePanels
from llmc.targets.cpu.kernels.byte_rows import STEP, ByteRows
from llmc.targets.cpu.kernels.integer import CodedRows
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    get,
    i64,
    lanes,
    prefetch,
    put,
    registers,
    scratch,
    splat,
)
from llmc.targets.cpu.kernels.register_tiles import fetch_residual
from llmc.targets.cpu.kernels.tile_tasks import (
    Chunks,
    TileTask,
    first_bytes,
    for_each_task,
    multiply_step,
    store_sums,
)
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.layout import PANEL
from llmc.targets.cpu.parameters import TileParameters

Expr = Any


def takes(fmt: WeightFormat, k: int) -> bool:
    """Whether products with rows of k features in the format can be made here."""
    return not fmt.is_float and k % STEP == 0


def byte_tiles(product: Product, x: CodedRows, count: Expr, params: TileParameters) -> None:
    """y = x · Wᵀ for `count` rows of activations, where `takes` says so."""
    weights = product.weights
    chunks = Chunks.of(weights.k // STEP, params.steps, max(1, weights.fmt.group // STEP))
    rows = ByteRows.prepare(x, count, chunks)
    for_each_task(product, count, params, lambda task: _Task.of(task, chunks, rows).emit())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A task and what it works in."""

    task: TileTask
    chunks: Chunks
    rows: ByteRows
    panels: BytePanels
    codes: Expr  # `[2, steps, 16, 16]` int32: a chunk of two panels as bytes
    exact: Expr  # `[2, tiles, 16, 16]` int32: and features of it in bfloat16
    scales: Expr  # `[2, 16]`: what the bytes stand for
    sums: Expr  # `[2, 2, 16, 16]` int32: a block's sums of bytes
    exact_sums: Expr  # likewise, float32
    totals: Expr | None  # `[groups, slots, 16, 16]`, where there are chunks or gates to wait for

    @classmethod
    def of(cls, task: TileTask, chunks: Chunks, rows: ByteRows) -> _Task:
        """Takes the scratch."""
        pair, tile = (amx.PANELS, amx.PANELS), (amx.TILE_ROWS, PANEL)
        waits = chunks.count > 1 or task.product.gated is not None
        return cls(
            task=task,
            chunks=chunks,
            rows=rows,
            panels=BytePanels(task.product.weights),
            codes=scratch((amx.PANELS, chunks.size, *tile), "int32"),
            exact=scratch((amx.PANELS, ByteRows.exact_tiles(chunks), *tile), "int32"),
            scales=registers(amx.PANELS),
            sums=scratch((*pair, *tile), "int32"),
            exact_sums=scratch((*pair, *tile)),
            totals=scratch((task.size, task.width, *tile)) if waits else None,
        )

    def emit(self) -> None:
        """Multiplies and stores."""
        amx.configure(STEP)
        self.task.for_each_stage(self.chunks.count, self._stage)
        if self.task.product.gated is not None:
            assert self.totals is not None
            self.task.store_gated(self.totals)
        amx.release()

    def _stage(self, number: Expr, slot: Expr) -> None:
        """All rows times a chunk of the two panels from `slot` on."""
        task = self.task
        start = self.chunks.start(number)
        steps = self.chunks.length(start)
        count = task.stage_panels(slot)
        for p in range(amx.PANELS):
            # Where there is no second one, the first is unpacked again.
            panel = T.Bind(task.panel(slot + T.min(i64(p), count - i64(1))))
            following = T.Bind(task.panel(slot + i64(amx.PANELS + p)))
            put(self.scales, p, self.panels.scale(panel, start, steps))
            inverse = T.Bind(splat(1.0) / get(self.scales, p))
            with T.serial(steps) as step:
                at = start + step
                self.panels.unpack(panel, at, inverse, self.codes, i64(p), step, following)
            self.panels.unpack_exact(panel, self.rows.features, number, self.exact, i64(p))

        def block(group: Expr, groups: int, width: int) -> None:
            one = _Block(self, number, start, steps, group, groups, slot, width)
            one.multiply()
            one.settle()

        task.for_each_block(count, block)


@dataclass(frozen=True, slots=True)
class _Block:
    """A chunk of two groups of rows × two panels, or one in place of two."""

    of: _Task
    number: Expr  # of the chunk
    start: Expr
    steps: Expr
    group: Expr  # the first, counted within the task, as slots are
    groups: int
    slot: Expr
    width: int

    def multiply(self) -> None:
        """Leaves the block's sums in `sums` and `exact_sums`."""
        of, rows = self.of, self.of.rows
        groups = [T.Bind(of.task.first_group + self.group + i64(g)) for g in range(self.groups)]

        def exact() -> None:
            for tile in range(int(of.exact.shape[1])):
                activations = [first_bytes(rows.exact, g, self.number, i64(tile)) for g in groups]
                weights = [first_bytes(of.exact, i64(p), i64(tile)) for p in range(self.width)]
                multiply_step("tdpbf16ps", activations, weights)

        def codes() -> None:
            with T.serial(self.steps) as step:
                if of.totals is not None and of.chunks.count > 1:
                    # The next block's totals, whose loads nothing else would hide.
                    for g, p in self._tiles():
                        at = (*self._place(amx.PANELS + g, p), step, i64(0))
                        prefetch(T.address_of(of.totals[*at]))
                self._fetch_residual(step)
                activations = [first_bytes(rows.codes, g, self.start + step) for g in groups]
                weights = [first_bytes(of.codes, i64(p), step) for p in range(self.width)]
                multiply_step("tdpbssd", activations, weights)

        self._sum_up(of.exact_sums, exact)
        self._sum_up(of.sums, codes)

    def _fetch_residual(self, step: Expr) -> None:
        """Asks for a row of what the sums will be added to, far from the one before it."""
        task = self.of.task
        if self.of.chunks.count > 1:  # where a choice in every step costs more than it gains
            return
        row = T.min(task.first_row(self.group) + step, task.num_rows - i64(1))
        panels = [task.first_slot + self.slot + i64(p) for p in range(self.width)]
        fetch_residual(task.product.residual, panels, [row])

    def _sum_up(self, into: Expr, products: Callable[[], None]) -> None:
        """Stores what the products add up to."""
        for g, p in self._tiles():
            amx.clear(amx.sum_tile(g, p))
        products()
        for g, p in self._tiles():
            store_sums(amx.sum_tile(g, p), into, i64(g), i64(p))

    def settle(self) -> None:
        """Adds the sums to the totals, or stores what they complete where the product goes."""
        last = self.of.chunks.count - 1
        is_first = self.number == i64(0)
        if self.of.task.product.gated is not None:
            self._either(is_first, lambda: self._add(True), lambda: self._add(False))
        elif last == 0:
            self._finish()
        else:

            def later() -> None:
                self._either(self.number == i64(last), self._finish, lambda: self._add(False))

            self._either(is_first, lambda: self._add(True), later)

    def _either(
        self, condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]
    ) -> None:
        if self.of.chunks.count == 1:  # which is the first
            then()
            return
        with T.If(condition):
            with T.Then():
                then()
            with T.Else():
                otherwise()

    def _add(self, is_first: bool) -> None:
        totals = self.of.totals
        assert totals is not None
        for g in range(self.groups):
            with T.serial(i64(amx.TILE_ROWS)) as row:
                for p, value in enumerate(self._values(g, row)):
                    at = (*self._place(g, p), row, lanes(i64(0)))
                    T.buffer_store(totals, value if is_first else value + totals[*at], list(at))

    def _finish(self) -> None:
        task, totals = self.of.task, self.of.totals
        for g in range(self.groups):
            first = task.first_row(self.group + i64(g))
            with T.serial(task.rows_from(first)) as row:
                values = self._values(g, row)
                if totals is not None:
                    places = [(*self._place(g, p), row, lanes(i64(0))) for p in range(self.width)]
                    values = [v + totals[*at] for v, at in zip(values, places, strict=True)]
                task.store_row(self.slot, first + row, [T.Bind(v) for v in values])

    def _values(self, g: int, row: Expr) -> list[Expr]:
        """A row's sums of the chunk, by panel."""
        of = self.of
        group = of.task.first_group + self.group + i64(g)
        scale = T.Bind(T.broadcast(of.rows.scales[self.number, group, row], PANEL))
        values = []
        for p in range(self.width):
            at = (i64(g), i64(p), row, lanes(i64(0)))
            scaled = T.Cast(F32X16, of.sums[*at]) * (scale * get(of.scales, p))
            values.append(scaled + of.exact_sums[*at])
        return values

    def _tiles(self) -> list[tuple[int, int]]:
        return [(g, p) for g in range(self.groups) for p in range(self.width)]

    def _place(self, g: int, p: int) -> tuple[Expr, Expr]:
        """Where totals hold a group and panel of this block, or of those behind it."""
        return self.group + i64(g), self.slot + i64(p)
