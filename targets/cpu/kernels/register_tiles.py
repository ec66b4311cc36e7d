"""Products in register tiles straight from packed weights: how rows and panels become tasks.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels.outputs import Gated, blocks_together
from llmc.targets.cpu.kernels.panels import (
    WeightPanels,
    get,
    lanes,
    prefetch,
    registers,
    scratch,
    splat,
)
from llmc.targets.cpu.kernels.tiles import Product, load_panel, store_panel
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import Tiling

Expr = Any
_FRACTION = 16  # bits


@dataclass(frozen=True, slots=True)
class Turn:
    """Which rows a tile takes of those that meet the same panels.

    While they do, what is read next comes from memory: each tile asks for its share of that.
    """

    first: Expr  # as a fraction of all rows, times 2^_FRACTION
    rows: Expr  # likewise
    then: Next

    @classmethod
    def of(cls, first: Expr, size: int, count: Expr, then: Next) -> Turn:
        """That of rows first … first + size - 1 of `count`."""

        def fraction(rows: Expr) -> Expr:
            # There are as many rows where there is the tile; TVM has to see that it is not by zero.
            return T.Bind(T.floordiv(rows * i64(1 << _FRACTION), T.max(count, i64(size))))

        return cls(fraction(first), fraction(i64(size)), then)

    def share(self, step: Expr, steps: int) -> Expr:
        """The step to ask for in a step of this tile; a chunk has so many."""
        done = self.first * i64(steps) + step * self.rows
        return T.Bind(self.then.chunk * i64(steps) + T.shift_right(done, i64(_FRACTION)))


@dataclass(frozen=True, slots=True)
class Next:
    """What is read after some panels, or after a chunk of them."""

    panels: Expr  # from each of them
    chunk: Expr

    @classmethod
    def after(cls, chunk: Expr, count: int, panels: int) -> Next:
        """After a chunk of `count`: the next one, or the first of those that follow."""
        is_last = T.Bind(chunk == i64(count - 1))
        return cls(
            T.Bind(T.Select(is_last, i64(panels), i64(0))),
            T.Bind(T.Select(is_last, i64(0), chunk + i64(1))),
        )


# (panels, rows, turn, the panel that is read afterwards where that is not the next) ->
# [row][panel]
Multiply = Callable[[list[Expr], list[Expr], Turn | None, Expr | None], list[list[Expr]]]
# (the first panel's place among those of the column, panels, rows, what was multiplied)
Store = Callable[[int, list[Expr], list[Expr], list[list[Expr]]], None]
# (rows, turn, [row][panel] so far) -> with a chunk's products
Add = Callable[[list[Expr], Turn | None, list[list[Expr]]], list[list[Expr]]]


@dataclass(frozen=True, slots=True)
class Chunks:
    """How more rows than the largest tile's are multiplied: by one chunk of features after the
    other, which is put together once for all of them.
    """

    tiling: Tiling
    rows: int  # that a chunk is put together for, at most
    count: int  # chunks of a row
    of: Callable[[list[Expr]], Callable[[Expr], Add]]  # panels -> what unpacks a chunk of them


def multiply_tiles(
    product: Product,
    tokens: int | None,
    count: Expr,
    row_bytes: int,
    tiling: Tiling,
    multiply: Multiply,
    chunks: Chunks | None = None,
) -> None:
    """A product of `count` rows (exactly one where tokens is 1) in tiles of `multiply`."""
    if product.gated is not None:
        _for_each_gated_tile(
            product, product.gated, tokens, count, row_bytes, tiling, multiply, chunks
        )
        return

    def asking(
        panels: list[Expr], rows: list[Expr], turn: Turn | None, following: Expr | None
    ) -> list[list[Expr]]:
        if len(rows) > 1:
            fetch_residual(product.residual, panels, rows)
        return multiply(panels, rows, turn, following)

    def store(_place: int, panels: list[Expr], rows: list[Expr], totals: list[list[Expr]]) -> None:
        store_tile(product, panels, rows, totals)

    _for_each_tile(product.weights, tokens, count, row_bytes, tiling, asking, store, chunks)


def _for_each_tile(
    weights: WeightPanels,
    tokens: int | None,
    count: Expr,
    row_bytes: int,
    tiling: Tiling,
    multiply: Multiply,
    store: Store,
    chunks: Chunks | None,
) -> None:
    """Covers `count` rows (exactly one where tokens is 1) × all panels by tiles.

    Tasks are row blocks × columns of a few panels, rows outermost: a block's rows, of `row_bytes`
    each, stay in the cache while weights stream by.
    """
    many = tiling if chunks is None else chunks.tiling
    width = min(tiling.one_token_panels if tokens == 1 else many.panels, weights.panels)
    columns = ceildiv(weights.panels, width)
    if tokens == 1:
        loop = T.serial if weights.m * weights.k <= tiling.serial_weights else T.parallel
        with loop(i64(columns)) as column:
            cover_column(weights, column, width, i64(0), None, tiling, multiply, store, None)
        return
    size = _rows_of_a_task(row_bytes, many)
    row_blocks = T.Bind(T.floordiv(count + i64(size - 1), i64(size)))
    with T.parallel(i64(columns) * row_blocks) as task:
        first = T.Bind(T.floordiv(task, i64(columns)) * i64(size))
        rows = T.Bind(T.min(i64(size), count - first))
        column = T.floormod(task, i64(columns))
        cover_column(weights, column, width, first, rows, tiling, multiply, store, chunks)


def _for_each_gated_tile(
    product: Product,
    gated: Gated,
    tokens: int | None,
    count: Expr,
    row_bytes: int,
    tiling: Tiling,
    multiply: Multiply,
    chunks: Chunks | None,
) -> None:
    """`for_each_tile` of a gated product: a task has a block of outputs, its gate's panels and
    up's.
    """
    weights = product.weights
    count_of = gated.panels
    columns = weights.panels // 2 // count_of
    many = tiling if chunks is None else chunks.tiling
    width = tiling.one_token_panels if tokens == 1 else many.panels
    both = width >= 2 * count_of  # a tile has all panels of a task
    width = min(width, count_of)

    def pieces(column: Expr) -> list[tuple[int, list[Expr], Expr | None]]:
        """(first place, panels, the panel that follows elsewhere) in the order of reading."""
        gate = T.Bind(column * i64(count_of))
        up = T.Bind(gate + i64(weights.panels // 2))
        if both:
            return [(0, [base + i64(p) for base in (gate, up) for p in range(count_of)], None)]
        found: list[tuple[int, list[Expr], Expr | None]] = []
        for half, (base, after) in enumerate(((gate, up), (up, gate + i64(count_of)))):
            for start in range(0, count_of, width):
                size = min(width, count_of - start)
                panels = [base + i64(start + p) for p in range(size)]
                is_last = start + size == count_of
                found.append((half * count_of + start, panels, after if is_last else None))
        return found

    if tokens == 1:
        loop = T.serial if weights.m * weights.k <= tiling.serial_weights else T.parallel
        with loop(i64(columns)) as column:
            values: list[Expr] = []
            for _, panels, following in pieces(column):
                [found] = multiply(panels, [i64(0)], None, following)
                values += [T.Bind(v) for v in _started(product, panels, i64(0), found)]
            gated.store(i64(0), column, values[:count_of], values[count_of:])
        return
    size = _rows_of_a_task(row_bytes, many)
    row_blocks = T.Bind(T.floordiv(count + i64(size - 1), i64(size)))
    with T.parallel(i64(columns) * row_blocks) as task:
        first = T.Bind(T.floordiv(task, i64(columns)) * i64(size))
        rows = T.Bind(T.min(i64(size), count - first))
        column = T.Bind(T.floormod(task, i64(columns)))
        sums = scratch((T.min(i64(size), count), 2 * count_of, PANEL))

        def keep(
            begin: int, place: int, panels: list[Expr], rows: list[Expr], totals: list[list[Expr]]
        ) -> None:
            for row, found in zip(rows, totals, strict=True):
                for p, value in enumerate(_started(product, panels, row, found), begin + place):
                    T.buffer_store(sums, value, [row - first, i64(p), lanes(i64(0))])

        for place, panels, _ in pieces(column):
            _cover(panels, width, first, rows, tiling, multiply, partial(keep, place), chunks)
        with T.serial(rows) as row:
            values = [sums[row, i64(p), lanes(i64(0))] for p in range(2 * count_of)]
            gated.store(first + row, column, values[:count_of], values[count_of:])


def _rows_of_a_task(row_bytes: int, tiling: Tiling) -> int:
    """Rows of `row_bytes` each that stay in the cache: whole tiles."""
    largest = tiling.token_tiles[0]
    return max(1, tiling.row_block_bytes // row_bytes // largest) * largest


def _cover(
    panels: list[Expr],
    step: int,
    first: Expr,
    rows: Expr,
    tiling: Tiling,
    multiply: Multiply,
    store: Store,
    chunks: Chunks | None,
) -> None:
    """Rows first … first + rows - 1 times a few panels; `step` panels after each is one of those
    that follow.
    """

    def at_once(place: int, panels: list[Expr], step: int) -> None:
        def tile(rows: list[Expr], turn: Turn | None) -> None:
            store(place, panels, rows, multiply(panels, rows, turn, None))

        _in_tiles(first, rows, tiling, Next(i64(step), i64(0)), tile)

    if chunks is None:
        at_once(0, panels, step)
        return
    with T.If(rows > i64(tiling.token_tiles[0])):
        with T.Then():
            _by_chunks(panels, step, first, rows, store, chunks)
        with T.Else():
            for place in range(0, len(panels), tiling.panels):
                few = panels[place : place + tiling.panels]
                at_once(place, few, step if len(few) == len(panels) else len(few))


def _in_tiles(
    first: Expr,
    rows: Expr,
    tiling: Tiling,
    then: Next,
    tile: Callable[[list[Expr], Turn | None], None],
) -> None:
    """Calls `tile` for rows first … first + rows - 1, as many at a time as there are left."""
    done: Expr = i64(0)
    for size in tiling.token_tiles:
        tiles = T.Bind(T.floordiv(rows - done, i64(size)))
        with T.serial(tiles) as number:
            start = T.Bind(done + number * i64(size))
            turn = Turn.of(start, size, rows, then) if size > 1 else None
            tile([first + start + i64(r) for r in range(size)], turn)
        done = T.Bind(done + tiles * i64(size))


def _by_chunks(
    panels: list[Expr], step: int, first: Expr, rows: Expr, store: Store, chunks: Chunks
) -> None:
    """As `_cover`, a chunk of features after the other; sums are in memory meanwhile."""
    size = chunks.rows
    sums = scratch((size, len(panels), PANEL))
    unpack = chunks.of(panels)
    with T.serial(T.floordiv(rows + i64(size - 1), i64(size))) as number:
        begin = T.Bind(first + number * i64(size))
        count = T.Bind(T.min(i64(size), first + rows - begin))
        with T.serial(i64(chunks.count)) as chunk:
            add = unpack(chunk)
            is_first, is_last = chunk == i64(0), chunk == i64(chunks.count - 1)

            def tile(rows: list[Expr], turn: Turn | None) -> None:
                places = [
                    [[row - begin, i64(p), lanes(i64(0))] for p in range(len(panels))]
                    for row in rows
                ]
                before = [
                    [T.Select(is_first, splat(0.0), sums[tuple(at)]) for at in of] for of in places
                ]
                totals = add(rows, turn, before)
                with T.If(is_last):
                    with T.Then():
                        store(0, panels, rows, totals)
                    with T.Else():
                        for of, values in zip(places, totals, strict=True):
                            for at, value in zip(of, values, strict=True):
                                T.buffer_store(sums, value, at)

            _in_tiles(begin, count, chunks.tiling, Next.after(chunk, chunks.count, step), tile)


def cover_column(
    weights: WeightPanels,
    column: Expr,
    width: int,
    first: Expr,
    rows: Expr | None,
    tiling: Tiling,
    multiply: Multiply,
    store: Store,
    chunks: Chunks | None,
) -> None:
    """Rows first … first + rows - 1 (None: the one row) times `width` panels, or what is left."""
    panel = T.Bind(column * i64(width))
    rest = weights.panels % width

    def emit(num_panels: int) -> None:
        panels = [panel + i64(p) for p in range(num_panels)]
        if rows is None:
            store(0, panels, [first], multiply(panels, [first], None, None))
        else:
            _cover(panels, num_panels, first, rows, tiling, multiply, store, chunks)

    if not rest:
        emit(width)
        return
    with T.If(panel + i64(width) <= i64(weights.panels)):
        with T.Then():
            emit(width)
        with T.Else():
            emit(rest)


def fetch_residual(residual: Expr | None, panels: Sequence[Expr], rows: Sequence[Expr]) -> None:
    """Asks for what `store_tile` will add to rows, which lie too far apart for the CPU to foresee.

    residual: `[1, T, M]`. An eighth of the time of a product of 2048 features.
    """
    if residual is None:
        return
    for row in rows:
        for panel in panels:
            prefetch(T.address_of(residual[i64(0), row, panel * i64(PANEL)]))


def store_tile(
    product: Product,
    panels: Sequence[Expr],
    rows: Sequence[Expr],
    totals: list[list[Expr]],
    expert: Expr | None = None,
) -> None:
    """Stores totals[row][panel] in those rows of y, with the bias and residual that the product
    starts from.
    """
    for row, by_panel in zip(rows, totals, strict=True):
        values = _started(product, panels, row, by_panel, expert)
        for panel, value in zip(panels, values, strict=True):
            store_panel(product, row, T.Bind(panel * i64(PANEL)), value)


def slot_panel(product: Product, slot: Expr) -> Expr:
    """The panel in a slot: where outputs are gated, the gate's and up's alternate."""
    if product.gated is None:
        return slot
    half = i64(product.weights.panels // 2)
    return T.floordiv(slot, i64(2)) + T.floormod(slot, i64(2)) * half


def store_slots(
    product: Product, row: Expr, first: Expr, count: Expr, total: Callable[[Expr], Expr]
) -> None:
    """Stores a row's outputs of `count` slots from `first` on; `total(i)` is that of slot
    first + i.

    Where outputs are gated, whole blocks of them.
    """
    gated = product.gated
    if gated is None:
        with T.serial(count) as slot:
            store_tile(product, [first + slot], [row], [[total(slot)]])
        return
    slots = 2 * gated.panels

    def store(place: Expr, blocks: int) -> None:
        gates, ups = (
            _started(
                product,
                [slot_panel(product, first + place + i64(slot)) for slot in of_half],
                row,
                [T.Bind(total(place + i64(slot))) for slot in of_half],
            )
            for of_half in (range(half, blocks * slots, 2) for half in range(2))
        )
        gated.store(row, T.Bind(T.floordiv(first + place, i64(slots))), gates, ups)

    together = blocks_together(gated.output)
    many = T.Bind(T.floordiv(count, i64(slots * together)))
    with T.serial(many) as number:
        store(T.Bind(number * i64(slots * together)), together)
    if together > 1:
        done = T.Bind(many * i64(together))
        with T.serial(T.floordiv(count, i64(slots)) - done) as number:
            store(T.Bind((done + number) * i64(slots)), 1)


def _started(
    product: Product,
    panels: Sequence[Expr],
    row: Expr,
    totals: Sequence[Expr],
    expert: Expr | None = None,
) -> list[Expr]:
    """A row's totals of panels and what they begin with."""
    if product.start is None:
        return list(totals)
    expert = i64(0) if expert is None else expert
    m = product.weights.m
    return [
        total + _start(product, m, expert, row, T.Bind(panel * i64(PANEL)))
        for panel, total in zip(panels, totals, strict=True)
    ]


def _start(product: Product, m: int, expert: Expr, row: Expr, column: Expr) -> Expr:
    """What 16 outputs begin with: bias and residual."""
    assert product.start is not None
    start = product.start
    if m % PANEL == 0:
        return start(expert, row, lanes(column))
    begin = registers(1)
    load_panel(m, column, lambda at: start(expert, row, at), begin, 0)
    return get(begin, 0)
