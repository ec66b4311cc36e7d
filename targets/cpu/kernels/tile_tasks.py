"""How products of many rows in matrix registers are cut into tasks, chunks and blocks.

A task has up to `TileParameters.rows` rows and a few panels. A chunk of the features at a time, it
prepares two panels' weights, which stay in the first-level cache while its rows pass by them: two
groups of sixteen rows times the two panels are a block, whose sums fill four tiles.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.panels import WeightPanels, lanes
from llmc.targets.cpu.kernels.register_tiles import slot_panel, store_slots, store_tile
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.layout import PANEL, ceildiv, plane_suffixes
from llmc.targets.cpu.parameters import TileParameters

Expr = Any


def row_groups(count: Expr) -> Expr:
    """Groups of sixteen rows that `count` rows make."""
    return T.Bind(T.floordiv(count + i64(amx.TILE_ROWS - 1), i64(amx.TILE_ROWS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """The steps of a row (a tile's depth each), cut into equal chunks of whole weight groups."""

    steps: int
    size: int  # steps of a chunk; the last may have fewer

    @classmethod
    def of(cls, steps: int, most: int, align: int) -> Chunks:
        """Chunks of at most `most` steps, or of `align` steps, of which whole ones make a group."""
        count = ceildiv(steps, most)
        return cls(steps=steps, size=ceildiv(ceildiv(steps, count), align) * align)

    @property
    def count(self) -> int:
        """Chunks of a row."""
        return ceildiv(self.steps, self.size)

    def start(self, number: Expr) -> Expr:
        """A chunk's first step."""
        return T.Bind(number * i64(self.size))

    def length(self, start: Expr) -> Expr:
        """Steps of the chunk from `start` on."""
        return T.Bind(T.min(i64(self.size), i64(self.steps) - start))


@dataclass(frozen=True, slots=True, kw_only=True)
class TileTask:
    """Up to `size` groups of rows × up to `width` panels.

    Panels are counted by slots, in whose order tasks take them: where the output is gated, a panel
    of the gate and its panel of up alternate.
    """

    product: Product
    first_group: Expr
    num_groups: Expr
    num_rows: Expr  # of all tasks
    first_slot: Expr
    num_panels: Expr
    width: int  # panels at most
    size: int  # groups at most

    def panel(self, slot: Expr) -> Expr:
        """The panel in a slot of this task."""
        return slot_panel(self.product, self.first_slot + slot)

    def first_row(self, group: Expr) -> Expr:
        """The first row of a group of this task."""
        return T.Bind((self.first_group + group) * i64(amx.TILE_ROWS))

    def rows_from(self, first: Expr) -> Expr:
        """Rows of the group that begins with row `first`."""
        return T.min(i64(amx.TILE_ROWS), self.num_rows - first)

    def for_each_stage(self, chunks: int, stage: Callable[[Expr, Expr], None]) -> None:
        """`stage(chunk, slot)` for two panels from `slot` on at a time, of every chunk."""
        with T.serial(i64(chunks)) as part, T.serial(self._pairs) as pair:
            stage(part, T.Bind(pair * i64(amx.PANELS)))

    @property
    def _pairs(self) -> Expr:
        return T.floordiv(self.num_panels + i64(amx.PANELS - 1), i64(amx.PANELS))

    def stage_number(self, chunk: Expr, slot: Expr) -> Expr:
        """How many stages are before it."""
        return chunk * self._pairs + T.floordiv(slot, i64(amx.PANELS))

    def next_stage(self, chunk: Expr, slot: Expr) -> tuple[Expr, Expr]:
        """(chunk, slot) of the stage that follows; behind the last one a chunk too many."""
        after = T.Bind(slot + i64(amx.PANELS))
        more = T.Bind(after < self.num_panels)
        return (
            T.Bind(T.Select(more, chunk, chunk + i64(1))),
            T.Bind(T.Select(more, after, i64(0))),
        )

    def stage_panels(self, slot: Expr) -> Expr:
        """Panels of the stage from `slot` on."""
        return T.Bind(T.min(i64(amx.PANELS), self.num_panels - slot))

    def for_each_block(self, block: Callable[[Expr, int], None]) -> None:
        """`block(first group, groups)` for all groups, two at a time and the last alone if odd."""
        with T.serial(T.floordiv(self.num_groups, i64(2))) as q:
            block(T.Bind(q * i64(2)), 2)
        with T.If(T.floormod(self.num_groups, i64(2)) > i64(0)), T.Then():
            block(self.num_groups - i64(1), 1)

    def with_width(self, panels: Expr, column: Callable[[int], None]) -> None:
        """`column(panels)` for so many panels of a stage, one or two, as a constant."""
        if self.product.weights.panels % amx.PANELS == 0:
            column(amx.PANELS)
            return
        with T.If(panels == i64(amx.PANELS)):
            with T.Then():
                column(amx.PANELS)
            with T.Else():
                column(1)

    def store_row(self, slot: Expr, row: Expr, values: list[Expr]) -> None:
        """Stores a row's sums of the panels from `slot` on where the product goes."""
        panels = [self.first_slot + slot + i64(p) for p in range(len(values))]
        store_tile(self.product, panels, [row], [values])

    def store_gated(self, totals: Expr) -> None:
        """Stores what becomes of the totals `[groups, slots, 16, 16]`."""
        with T.serial(self.num_groups) as group:
            first = self.first_row(group)
            rows = first, self.rows_from(first)
            store_totals(self.product, rows, (self.first_slot, self.num_panels), totals, group)


def for_each_task(
    product: Product, count: Expr, params: TileParameters, body: Callable[[TileTask], None]
) -> None:
    """`body(task)` in parallel, for blocks of `count` rows × columns of panels."""
    weights = product.weights
    width = panels_of_a_task(product, params.panels, params.min_columns, amx.PANELS)
    columns = ceildiv(weights.panels, width)
    size = params.rows // amx.TILE_ROWS
    groups = row_groups(count)
    row_blocks = T.Bind(T.floordiv(groups + i64(size - 1), i64(size)))
    # Blocks of equal size, of whole pairs.
    pairs = T.floordiv(groups + i64(1), i64(2))
    fair = T.Bind(T.floordiv(pairs + row_blocks - i64(1), row_blocks) * i64(2))
    with T.parallel(i64(columns) * row_blocks) as task:
        first = T.Bind(T.floordiv(task, i64(columns)) * fair)
        slot = T.Bind(T.floormod(task, i64(columns)) * i64(width))
        body(
            TileTask(
                product=product,
                first_group=first,
                num_groups=T.Bind(T.min(fair, groups - first)),
                num_rows=count,
                first_slot=slot,
                num_panels=T.Bind(T.min(i64(width), i64(weights.panels) - slot)),
                width=width,
                size=size,
            )
        )


def for_each_column(product: Product, width: int, body: Callable[[Expr, Expr], None]) -> None:
    """`body(first slot, panels)` in parallel, for columns of up to `width` panels."""
    panels = product.weights.panels
    with T.parallel(i64(ceildiv(panels, width))) as column:
        first = T.Bind(column * i64(width))
        body(first, T.Bind(T.min(i64(width), i64(panels) - first)))


def store_totals(
    product: Product,
    rows: tuple[Expr, Expr],
    slots: tuple[Expr, Expr],
    totals: Expr,
    *index: Expr,
) -> None:
    """Stores what becomes of totals[index] `[slots, 16, 16]`; rows and slots are (first, count)."""
    with T.serial(rows[1]) as row:
        store_slots(
            product, rows[0] + row, *slots, lambda slot: totals[*index, slot, row, lanes(i64(0))]
        )


def panels_of_a_task(product: Product, most: int, min_columns: int, unit: int = 1) -> int:
    """Whole units of panels, fewer than `most` where the matrix has too few rows for so many tasks;
    whole blocks of a gated output.
    """
    width = min(most, ceildiv(product.weights.panels, min_columns))
    if product.gated is not None:
        unit = 2 * product.gated.panels
    return ceildiv(width, unit) * unit


def place_of(row: Expr) -> tuple[Expr, Expr]:
    """(group, place in it) of a row."""
    group = T.Bind(T.floordiv(row, i64(amx.TILE_ROWS)))
    return group, T.Bind(T.floormod(row, i64(amx.TILE_ROWS)))


def multiply_step(
    instruction: str,
    activations: list[Expr],
    weights: list[Expr],
    activation_bytes: int = amx.TILE_BYTES,
) -> None:
    """Adds the products of groups' activation tiles and panels' weight tiles at these addresses.

    Loads stand as late as they may: one tile at a time is waited for.
    """
    for g, activation in enumerate(activations):
        for p, weight in enumerate(weights):
            if g == 0:
                amx.load(amx.weight_tile(p), weight, amx.TILE_BYTES)
            if p == 0:
                amx.load_once(amx.activation_tile(g), activation, activation_bytes)
            tiles = amx.sum_tile(g, p), amx.activation_tile(g), amx.weight_tile(p)
            amx.multiply(instruction, *tiles)


def first_bytes(tile: Expr, *index: Expr) -> Expr:
    """The address of a tile `[..., 16, n]` of a buffer."""
    return T.address_of(tile[*index, i64(0), i64(0)])


def store_sums(tile: int, into: Expr, *index: Expr) -> None:
    """Stores sixteen rows of sums at `into[index]`, of a buffer `[..., 16, 16]`.

    TVM cuts a buffer down to what is seen to be used of it: without its last element, which the
    address of the first does not show, to as many rows as are read later.
    """
    amx.store(tile, first_bytes(into, *index), amx.TILE_BYTES)
    last = into[*index, i64(amx.TILE_ROWS - 1), i64(PANEL - 1)]
    T.evaluate(T.address_of(last))


def interleave(stages: list[Iterator[None]]) -> None:
    """Goes on with each of the stages in turns until all have ended."""
    while stages:
        stages = [stage for stage in stages if next(stage, stage) is None]


def code_bytes(
    weights: WeightPanels, panel: Expr, unit: Expr, words: int, number: int, low: int
) -> Expr:
    """Word `number` of a unit of so many words of four features: the unsigned codes of each of 16
    rows, int32x16, a code from bit `low` of its byte on.
    """
    fmt = weights.fmt
    parts: list[Expr] = []
    for name, bits in zip(plane_suffixes("codes", fmt.planes), fmt.planes, strict=True):
        fields = 8 // bits
        at = unit * i64(words // fields) + i64(number // fields)
        word = weights.buffers[name][panel, at, lanes(i64(0))]
        shift = low - number % fields * bits
        move = T.shift_left if shift > 0 else T.shift_right
        if shift:
            word = move(word, T.broadcast(T.int32(abs(shift)), PANEL))
        parts.append(T.bitwise_and(word, in_each_byte(((1 << bits) - 1) << low)))
        low += bits
    return parts[0] if len(parts) == 1 else T.bitwise_or(*parts)


def unit_addresses(weights: WeightPanels, panel: Expr, unit: Expr, features: int) -> list[Expr]:
    """Where a unit of so many features of a panel lies."""
    fmt = weights.fmt
    groups = max(1, features // fmt.group) if fmt.group else 1
    found = weights.scale_lines(i64(0), panel, unit * i64(groups))
    for name, bits in zip(plane_suffixes("codes", fmt.planes), fmt.planes, strict=True):
        words = features * bits // 32
        for i in range(words):
            found.append(weights.address(name, i64(0), panel, unit * i64(words) + i64(i)))
    return found


def in_each_byte(value: int) -> Expr:
    """The byte in all bytes of an int32x16."""
    word = int.from_bytes(bytes([value] * 4), "little", signed=True)
    return T.broadcast(T.int32(word), PANEL)
