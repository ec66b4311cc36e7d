"""Products in register tiles straight from packed weights: how rows and panels become tasks.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.kernels.panels import WeightPanels, get, i64, lanes, prefetch, registers
from llmc.targets.cpu.kernels.tiles import Product, load_panel, store_panel
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import Tiling

Expr = Any
# (panels, rows) -> None: multiplies and stores one tile
Tile = Callable[[list[Expr], list[Expr]], None]


def for_each_tile(
    weights: WeightPanels,
    tokens: int | None,
    count: Expr,
    row_bytes: int,
    tiling: Tiling,
    tile: Tile,
    prepare: Callable[[list[Expr]], Tile] | None = None,
) -> None:
    """Covers `count` rows (exactly one where tokens is 1) × all panels by tiles.

    Tasks are row blocks × columns of a few panels, rows outermost: a block's rows, of `row_bytes`
    each, stay in the cache while weights stream by. In a task of more rows than the largest tile,
    `prepare` may do what all its tiles need; they are then those that it returns.
    """
    width = min(tiling.one_token_panels if tokens == 1 else tiling.panels, weights.panels)
    columns = ceildiv(weights.panels, width)
    if tokens == 1:
        loop = T.serial if weights.m * weights.k <= tiling.serial_weights else T.parallel
        with loop(i64(columns)) as column:
            cover_column(weights, column, width, i64(0), None, tiling, tile, None)
        return
    largest = tiling.token_tiles[0]
    size = max(1, tiling.row_block_bytes // row_bytes // largest) * largest
    row_blocks = T.Bind(T.floordiv(count + i64(size - 1), i64(size)))
    with T.parallel(i64(columns) * row_blocks) as task:
        first = T.Bind(T.floordiv(task, i64(columns)) * i64(size))
        rows = T.Bind(T.min(i64(size), count - first))
        column = T.floormod(task, i64(columns))
        cover_column(weights, column, width, first, rows, tiling, tile, prepare)


def cover_column(
    weights: WeightPanels,
    column: Expr,
    width: int,
    first: Expr,
    rows: Expr | None,
    tiling: Tiling,
    tile: Tile,
    prepare: Callable[[list[Expr]], Tile] | None,
) -> None:
    """Rows first … first + rows - 1 (None: the one row) times `width` panels, or what is left."""
    panel = T.Bind(column * i64(width))
    rest = weights.panels % width

    def cover(panels: list[Expr], rows: Expr, tile: Tile) -> None:
        done: Expr = i64(0)
        for size in tiling.token_tiles:
            tiles = T.Bind(T.floordiv(rows - done, i64(size)))
            with T.serial(tiles) as number:
                start = T.Bind(first + done + number * i64(size))
                tile(panels, [start + i64(r) for r in range(size)])
            done = T.Bind(done + tiles * i64(size))

    def emit(num_panels: int) -> None:
        panels = [panel + i64(p) for p in range(num_panels)]
        if rows is None:
            tile(panels, [first])
        elif prepare is None:
            cover(panels, rows, tile)
        else:
            with T.If(rows > i64(tiling.token_tiles[0])):
                with T.Then():
                    cover(panels, rows, prepare(panels))
                with T.Else():
                    cover(panels, rows, tile)

    if not rest:
        emit(width)
        return
    with T.If(panel + i64(width) <= i64(weights.panels)):
        with T.Then():
            emit(width)
        with T.Else():
            emit(rest)


def fetch_residual(residual: Expr | None, panels: Sequence[Expr], rows: Sequence[Expr]) -> None:
    """Asks for what `store_tile` will add to several rows: too far apart for the CPU to foresee.

    residual: `[1, T, M]`. An eighth of the time of a product of 2048 features.
    """
    if residual is None or len(rows) == 1:
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
    m = product.weights.m
    for p, panel in enumerate(panels):
        column = T.Bind(panel * i64(PANEL))
        for row, by_panel in zip(rows, totals, strict=True):
            value = by_panel[p]
            if product.start is not None:
                value = value + _start(
                    product, m, i64(0) if expert is None else expert, row, column
                )
            store_panel(product, row, column, value)


def _start(product: Product, m: int, expert: Expr, row: Expr, column: Expr) -> Expr:
    """What 16 outputs begin with: bias and residual."""
    assert product.start is not None
    start = product.start
    if m % PANEL == 0:
        return start(expert, row, lanes(column))
    begin = registers(1)
    load_panel(m, column, lambda at: start(expert, row, at), begin, 0)
    return get(begin, 0)
