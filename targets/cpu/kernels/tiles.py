"""Products with one block of a matrix' columns: unpacked once for many rows, in register tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64
from llmc.targets.cpu.kernels.byte_table import ByteTable
from llmc.targets.cpu.kernels.dot import Activations, dot_panel
from llmc.targets.cpu.kernels.interleaved_rows import InterleavedRows
from llmc.targets.cpu.kernels.outputs import Gated
from llmc.targets.cpu.kernels.panels import (
    Rows,
    WeightPanels,
    get,
    k_block_words,
    lanes,
    put,
    registers,
    scratch,
    splat,
    unpack_panel,
)
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import LinearParameters

Expr = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What is multiplied and where the result goes; rows are counted by position.

    x: `[R, K]`, y: `[R', M]`; `x_row(position)` and `y_row(position)` find a position's rows;
    `start(expert, row, index)` is what the sum at `y[row, index]` starts from (None: zero), scalar
    or vector like `index`.
    """

    weights: WeightPanels
    x: Rows
    y: Rows | None  # None where `gated` takes the results
    x_row: Callable[[Expr], Expr]
    y_row: Callable[[Expr], Expr]
    start: Callable[[Expr, Expr, Expr], Expr] | None
    residual: Expr | None = None  # `[1, T, M]`, part of `start`
    gated: Gated | None = None

    @classmethod
    def arguments(
        cls,
        x: Expr,
        fmt: WeightFormat,
        m: int,
        k: int,
        *,
        bias: bool,
        residual: bool,
        in_place: bool = False,
        table: ByteTable | None = None,
        gate: Callable[[Expr], Gated] | None = None,
    ) -> Product:
        """One matrix times all rows of x `[1, T, K]`; declares the kernel's arguments behind x: the
        packed arrays, bias and residual where asked, y `[1, T, M]` or what `gate(T)` declares.

        In place, y is the residual to begin with: each element is read once, before it is written.
        """
        count = x.ty.shape[1]
        weights = WeightPanels.arguments(fmt, m, k, table=table)
        biases = [argument("bias", (m,))] if bias else []
        residuals = [argument("residual", (1, count, m))] if residual and not in_place else []
        gated = None if gate is None else gate(count)
        y = argument("y", (1, count, m)) if gated is None else None
        if in_place:
            residuals = [y]

        def start(expert: Expr, row: Expr, index: Expr) -> Expr:
            values = [b[index] for b in biases] + [r[i64(0), row, index] for r in residuals]
            return sum(values[1:], start=values[0])

        return cls(
            weights=weights,
            x=Rows(x),
            y=None if y is None else Rows(y),
            x_row=lambda position: position,
            y_row=lambda position: position,
            start=start if bias or residual else None,
            residual=residuals[0] if residual else None,
            gated=gated,
        )


def store_panel(product: Product, row: Expr, column: Expr, value: Expr) -> None:
    """Stores 16 outputs of y from `column`, or as many as the matrix has there."""
    m = product.weights.m
    assert product.y is not None
    if m % PANEL == 0:
        product.y.set(row, lanes(column), value)
        return
    with T.If(column + i64(PANEL) <= i64(m)):
        with T.Then():
            product.y.set(row, lanes(column), value)
        with T.Else():
            partial = registers(1)
            put(partial, 0, value)
            with T.serial(i64(m % PANEL)) as lane:
                product.y.set(row, column + lane, partial[i64(0), lane])


def load_panel(m: int, column: Expr, load: Callable[[Expr], Expr], into: Expr, index: int) -> None:
    """Sets vector `index` to the 16 values that `load` has from `column`, zero past row m."""
    rest = m % PANEL
    if rest == 0:
        put(into, index, load(lanes(column)))
        return
    with T.If(column + i64(PANEL) <= i64(m)):
        with T.Then():
            put(into, index, load(lanes(column)))
        with T.Else():
            put(into, index, splat(0.0))
            with T.serial(i64(rest)) as lane:
                T.buffer_store(into, load(column + lane), [i64(index), lane])


def num_column_blocks(weights: WeightPanels, params: LinearParameters) -> int:
    """Column blocks that `multiply_columns` cuts the matrix into."""
    return ceildiv(weights.panels, min(params.tile_panels, weights.panels))


def multiply_columns(
    product: Product,
    expert: Expr,
    column_block: Expr,
    first: Expr,
    count: Expr,
    params: LinearParameters,
    interleaved: InterleavedRows | None = None,
) -> None:
    """Multiplies positions first … first + count - 1 with one column block of (an expert's)
    weights.

    A block of features at a time is unpacked into scratch that stays in cache and multiplied with
    all rows; y holds the sums between blocks. `interleaved` are the product's rows by position, in
    tiles of as many as the largest takes.
    """
    weights = product.weights
    tile_panels = min(params.tile_panels, weights.panels)
    block_words = k_block_words(weights, params.k_block)
    block_features = block_words * weights.width
    first_panel = T.Bind(column_block * i64(tile_panels))
    tile = _Tile(
        product=product,
        interleaved=interleaved,
        expert=expert,
        first_panel=first_panel,
        num_panels=tile_panels,
        unpacked=scratch((block_features, tile_panels * PANEL)),
        acc=registers(params.token_tiles[0] * tile_panels),
    )
    with T.serial(i64(ceildiv(weights.words, block_words))) as block:
        tile.unpack(block, block_words)
        start = T.Bind(block * i64(block_features))
        features = T.Bind(T.min(i64(block_features), i64(weights.k) - start))
        done: Expr = i64(0)
        for size in params.token_tiles:
            tiles = T.Bind(T.floordiv(count - done, i64(size)))
            with T.serial(tiles) as index:
                tile.multiply(T.Bind(first + done + index * i64(size)), size, start, features)
            done = T.Bind(done + tiles * i64(size))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """A few positions × `num_panels` panels; `unpacked` `[features, 16 · num_panels]`."""

    product: Product
    interleaved: InterleavedRows | None
    expert: Expr
    first_panel: Expr
    num_panels: int
    unpacked: Expr
    acc: Expr

    def unpack(self, block: Expr, block_words: int) -> None:
        """Dequantizes a block of features of the tile's panels."""
        weights = self.product.weights
        for p in range(self.num_panels):
            panel = self.first_panel + i64(p)
            if weights.panels % self.num_panels:
                # The last block's missing panels repeat its last one; their results are never
                # stored.
                panel = T.min(panel, i64(weights.panels - 1))

            def store(feature: Expr, value: Expr, column: int = p * PANEL) -> None:
                T.buffer_store(self.unpacked, value, [feature, lanes(i64(column))])

            unpack_panel(weights, self.expert, T.Bind(panel), block, block_words, store)

    def multiply(self, position: Expr, size: int, start: Expr, features: Expr) -> None:
        """Adds features start … start + features - 1 to y at `size` positions."""
        factor = self._factors(position, size)
        y_rows = [T.Bind(self.product.y_row(position + i64(r))) for r in range(size)]
        assert self.product.y is not None
        with T.If(start == i64(0)):
            with T.Then():
                self._each(y_rows, self._begin)
            with T.Else():
                self._each(y_rows, self.product.y.at)
        with T.serial(features) as k:
            columns = range(self.num_panels)
            weights = [T.Bind(self.unpacked[k, lanes(i64(p * PANEL))]) for p in columns]
            for r in range(size):
                value = T.Bind(T.broadcast(factor(r, start + k), PANEL))
                for p in columns:
                    index = r * self.num_panels + p
                    put(self.acc, index, get(self.acc, index) + value * weights[p])
        self._store(y_rows)

    def _factors(self, position: Expr, size: int) -> Callable[[int, Expr], Expr]:
        """factor(r, feature) at `position` + r."""
        if self.interleaved is not None:
            return self.interleaved.reader(position)
        rows = [T.Bind(self.product.x_row(position + i64(r))) for r in range(size)]
        return lambda r, feature: self.product.x.at(rows[r], feature)

    def _begin(self, row: Expr, at: Expr) -> Expr:
        if self.product.start is not None:
            return self.product.start(self.expert, row, at)
        return splat(0.0) if isinstance(at, tirx.Ramp) else T.float32(0.0)

    def _columns(self, action: Callable[[int, Expr], None]) -> None:
        """`action(p, first column)` for every panel of the tile that the matrix has."""
        panels = self.product.weights.panels
        for p in range(self.num_panels):
            panel = self.first_panel + i64(p)
            if p and panels % self.num_panels:
                with T.If(panel < i64(panels)), T.Then():
                    action(p, panel * i64(PANEL))
            else:
                action(p, panel * i64(PANEL))

    def _each(self, rows: list[Expr], load: Callable[[Expr, Expr], Expr]) -> None:
        def action(p: int, column: Expr) -> None:
            for r, row in enumerate(rows):
                index = r * self.num_panels + p
                load_panel(
                    self.product.weights.m, column, lambda at: load(row, at), self.acc, index
                )

        self._columns(action)

    def _store(self, rows: list[Expr]) -> None:
        def action(p: int, column: Expr) -> None:
            for r, row in enumerate(rows):
                value = get(self.acc, r * self.num_panels + p)
                store_panel(self.product, row, column, value)

        self._columns(action)


def dot_tile(
    product: Product,
    x: Activations,
    expert: Expr,
    panel: Expr,
    positions: list[Expr],
    params: LinearParameters,
) -> None:
    """Multiplies a few positions with one panel, decoding its weights in registers."""
    m = product.weights.m
    x_rows = [T.Bind(product.x_row(position)) for position in positions]
    totals = dot_panel(product.weights, expert, panel, x, x_rows, params)
    column = panel * i64(PANEL)
    for position, total in zip(positions, totals, strict=True):
        row = T.Bind(product.y_row(position))
        if product.start is None:
            store_panel(product, row, column, total)
            continue
        begin = registers(1) if m % PANEL else None
        if begin is None:
            value = product.start(expert, row, lanes(column))
        else:
            load_panel(m, column, lambda at, row=row: product.start(expert, row, at), begin, 0)
            value = get(begin, 0)
        store_panel(product, row, column, total + value)


def fused_positions(
    product: Product,
    x: Activations,
    expert: Expr,
    panel: Expr,
    first: Expr,
    count: Expr,
    params: LinearParameters,
) -> None:
    """Multiplies positions first … first + count - 1 with one panel, a token tile at a time."""
    done: Expr = i64(0)
    for size in params.token_tiles:
        tiles = T.Bind(T.floordiv(count - done, i64(size)))
        with T.serial(tiles) as tile:
            start = T.Bind(first + done + tile * i64(size))
            positions = [start + i64(r) for r in range(size)]
            dot_tile(product, x, expert, panel, positions, params)
        done = T.Bind(done + tiles * i64(size))
