"""Products of many activation rows in matrix registers, in bfloat16 with float32 sums.

Both factors lie in tiles of 1 KiB, the order in which the registers are loaded: activations are
brought into it once a product, weights of other formats than bfloat16 once for up to
`TileParameters.rows` rows, a chunk of features at a time, so that the chunk's weights stay in the
second-level cache and a pair of row groups' activations in the first. Sums wait in memory between
chunks.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.panels import i64, lanes, prefetch, scratch
from llmc.targets.cpu.kernels.register_tiles import slot_panel, store_slots, store_tile
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.kernels.unpacked_bfloat16 import unpack_step
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import TileParameters

Expr = Any
# (row, first feature) -> 16 consecutive features of an activation row as bfloat16 (uint16x16)
Values = Callable[[Expr, Expr], Expr]


def tile_depth(k: int) -> int:
    """Input features of one step: the most that divide k."""
    return gcd(k, amx.TILE_BYTES // 2)


def bfloat16_tiles(product: Product, values: Values, count: Expr, params: TileParameters) -> None:
    """y = x · Wᵀ for `count` rows of activations; k is a multiple of 16."""
    weights = product.weights
    depth = tile_depth(weights.k)
    steps = weights.k // depth
    groups = T.Bind(T.floordiv(count + i64(amx.TILE_ROWS - 1), i64(amx.TILE_ROWS)))
    activations = scratch((groups, steps, amx.TILE_ROWS, depth), "uint16")
    # What rows past the last make the registers compute is not stored.
    tile_activations(activations, values, count)

    width = _panels_of_a_task(product, params)
    columns = ceildiv(weights.panels, width)
    size = params.rows // amx.TILE_ROWS
    row_blocks = T.Bind(T.floordiv(groups + i64(size - 1), i64(size)))
    # Blocks of equal size, of whole pairs.
    pairs = T.floordiv(groups + i64(1), i64(2))
    fair = T.Bind(T.floordiv(pairs + row_blocks - i64(1), row_blocks) * i64(2))
    with T.parallel(i64(columns) * row_blocks) as task:
        first = T.Bind(T.floordiv(task, i64(columns)) * fair)
        slot = T.Bind(T.floormod(task, i64(columns)) * i64(width))
        _Task(
            product=product,
            activations=activations,
            params=params,
            depth=depth,
            steps=steps,
            first_group=first,
            num_groups=T.Bind(T.min(fair, groups - first)),
            num_rows=count,
            first_slot=slot,
            num_panels=T.Bind(T.min(i64(width), i64(weights.panels) - slot)),
            width=width,
            size=size,
        ).emit()


def _panels_of_a_task(product: Product, params: TileParameters) -> int:
    """Pairs of panels, fewer where the matrix has too few rows for many tasks; whole blocks of a
    gated output.
    """
    width = min(params.panels, ceildiv(product.weights.panels, params.min_columns))
    unit = amx.PANELS * (1 if product.gated is None else product.gated.panels)
    return ceildiv(width, unit) * unit


def tile_activations(tiles: Expr, values: Values, rows: Expr) -> None:
    """Puts `rows` rows into tiles `[groups, steps, 16, depth]`; further ones stay unwritten."""
    steps, depth = int(tiles.shape[1]), int(tiles.shape[3])
    with T.parallel(rows) as row:
        group = T.Bind(T.floordiv(row, i64(amx.TILE_ROWS)))
        place = T.Bind(T.floormod(row, i64(amx.TILE_ROWS)))
        with T.serial(i64(steps)) as step:
            for part in range(0, depth, PANEL):
                found = values(row, step * i64(depth) + i64(part))
                T.buffer_store(tiles, found, [group, step, place, lanes(i64(part))])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """Up to `rows` rows × up to `width` panels.

    Panels are counted by slots, in whose order tasks take them: where the output is gated, a panel
    of the gate and its panel of up alternate.
    """

    product: Product
    activations: Expr  # `[groups, steps, 16, depth]` uint16
    params: TileParameters
    depth: int
    steps: int
    first_group: Expr
    num_groups: Expr
    num_rows: Expr  # of all tasks
    first_slot: Expr
    num_panels: Expr
    width: int  # panels at most
    size: int  # groups at most

    def emit(self) -> None:
        """Multiplies and stores them."""
        weights = self.product.weights
        amx.configure(2 * self.depth)
        chunk, chunks = self._chunk()
        gated = self.product.gated is not None
        # What one chunk sums up leaves each block's sums at once, if it is an output by itself.
        keep = chunks > 1 or gated
        blocks = (self.size, self.width) if keep else (amx.PANELS, amx.PANELS)
        totals = scratch((*blocks, amx.TILE_ROWS, PANEL))
        unpacked = None
        if not weights.fmt.is_float:
            unpacked = scratch((amx.PANELS, chunk, self.depth // 2, PANEL), "int32")

        def stage(number: Expr, slot: Expr) -> None:
            """All rows times a chunk of the two panels from `slot` on."""
            start = T.Bind(number * i64(chunk))
            steps = T.Bind(T.min(i64(chunk), i64(self.steps) - start))
            slots = T.Bind(T.min(i64(amx.PANELS), self.num_panels - slot))
            if unpacked is not None:
                with T.serial(slots) as p, T.serial(steps) as step:
                    unpack_step(weights, self.panel(slot + p), start + step, unpacked, p, step)

            def block(group: Expr, groups: int, panels: int) -> None:
                one = _Block(self, unpacked, totals, keep, group, groups, slot, panels)
                one.multiply(start, steps, is_first=number == i64(0))
                if not gated:
                    with T.If(number == i64(chunks - 1)), T.Then():
                        one.finish()

            def column(panels: int) -> None:
                with T.serial(T.floordiv(self.num_groups, i64(2))) as q:
                    block(T.Bind(q * i64(2)), 2, panels)
                with T.If(T.floormod(self.num_groups, i64(2)) > i64(0)), T.Then():
                    block(self.num_groups - i64(1), 1, panels)

            # The panels' weights stay in the first-level cache while rows pass.
            if weights.panels % amx.PANELS == 0:
                column(amx.PANELS)
                return
            with T.If(slots == i64(amx.PANELS)):
                with T.Then():
                    column(amx.PANELS)
                with T.Else():
                    column(1)

        pairs = T.floordiv(self.num_panels + i64(amx.PANELS - 1), i64(amx.PANELS))
        with T.serial(i64(chunks)) as part, T.serial(pairs) as pair:
            stage(part, T.Bind(pair * i64(amx.PANELS)))
        if gated:
            self._gate(totals)
        amx.release()

    def panel(self, slot: Expr) -> Expr:
        """The panel in a slot of this task."""
        return slot_panel(self.product, self.first_slot + slot)

    def _gate(self, totals: Expr) -> None:
        """Stores what becomes of the totals `[groups, slots, 16, 16]`."""
        with T.serial(self.num_groups) as group:
            first = T.Bind((self.first_group + group) * i64(amx.TILE_ROWS))
            with T.serial(T.min(i64(amx.TILE_ROWS), self.num_rows - first)) as row:
                store_slots(
                    self.product,
                    first + row,
                    self.first_slot,
                    self.num_panels,
                    lambda slot: totals[group, slot, row, lanes(i64(0))],
                )

    def _chunk(self) -> tuple[int, int]:
        """Steps of a chunk and chunks: equal ones, of which each begins with a group of weights."""
        align = max(1, self.product.weights.fmt.group // self.depth)
        chunks = ceildiv(self.steps, self.params.steps)
        chunk = ceildiv(ceildiv(self.steps, chunks), align) * align
        return chunk, ceildiv(self.steps, chunk)


@dataclass(frozen=True, slots=True)
class _Block:
    """Two groups of rows × two panels, or one in place of two."""

    task: _Task
    unpacked: Expr | None  # `[panels, steps, depth / 2, 16]` int32
    totals: Expr  # `[groups, slots, 16, 16]`
    kept: bool  # whether totals hold all blocks, or this one
    group: Expr  # the first, counted within the task, as slots are
    groups: int
    slot: Expr
    panels: int

    def multiply(self, start: Expr, steps: Expr, *, is_first: Expr) -> None:
        """Adds a chunk to the totals."""
        tiles = [(g, p) for g in range(self.groups) for p in range(self.panels)]
        with T.If(is_first):
            with T.Then():
                for g, p in tiles:
                    amx.clear(amx.sum_tile(g, p))
            with T.Else():
                for g, p in tiles:
                    amx.load(amx.sum_tile(g, p), self._total(g, p, i64(0)), amx.TILE_BYTES)
        with T.serial(steps) as step:
            if self.kept:
                # The next block's sums, whose loads nothing else would hide.
                for g, p in tiles:
                    prefetch(self._total(amx.PANELS + g, p, step))
            # Loads stand as late as they may: one tile at a time is waited for.
            for g in range(self.groups):
                row = self.task.first_group + self.group + i64(g)
                values = self.task.activations[row, start + step, i64(0), i64(0)]
                for p in range(self.panels):
                    if g == 0:
                        at = self._weight(p, start, step)
                        amx.load(amx.weight_tile(p), at, amx.TILE_BYTES)
                    if p == 0:
                        at = T.address_of(values)
                        amx.load_once(amx.activation_tile(g), at, 2 * self.task.depth)
                    sums, x, w = amx.sum_tile(g, p), amx.activation_tile(g), amx.weight_tile(p)
                    amx.multiply("tdpbf16ps", sums, x, w)
        for g, p in tiles:
            amx.store(amx.sum_tile(g, p), self._total(g, p, i64(0)), amx.TILE_BYTES)

    def finish(self) -> None:
        """Stores the totals where the product goes."""
        task = self.task
        panels = [task.first_slot + self.slot + i64(p) for p in range(self.panels)]
        for g in range(self.groups):
            first = T.Bind((task.first_group + self.group + i64(g)) * i64(amx.TILE_ROWS))
            with T.serial(T.min(i64(amx.TILE_ROWS), task.num_rows - first)) as row:
                found = [
                    self.totals[*self._place(g, p), row, lanes(i64(0))] for p in range(self.panels)
                ]
                store_tile(task.product, panels, [first + row], [found])

    def _place(self, g: int, p: int) -> tuple[Expr, Expr]:
        """Where totals hold a group and panel of this block, or of those behind it."""
        group, slot = (self.group, self.slot) if self.kept else (i64(0), i64(0))
        return group + i64(g), slot + i64(p)

    def _total(self, g: int, p: int, row: Expr) -> Expr:
        return T.address_of(self.totals[*self._place(g, p), row, i64(0)])

    def _weight(self, p: int, start: Expr, step: Expr) -> Expr:
        if self.unpacked is not None:
            return T.address_of(self.unpacked[i64(p), step, i64(0), i64(0)])
        word = (start + step) * i64(self.task.depth // 2)
        panel = self.task.panel(self.slot + i64(p))
        return self.task.product.weights.word_address(i64(0), panel, word)
