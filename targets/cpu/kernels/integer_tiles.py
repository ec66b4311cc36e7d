"""Integer products of many activation rows in matrix registers: the arithmetic of integer.py.

A task unpacks the codes of its panels once, as signed bytes (zero point subtracted) where the
format has no minimum, and multiplies them with all of its rows. The functions here run while an
IRBuilder frame is open.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.integer import CodedRows, unit_of
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    WeightPanels,
    i64,
    lanes,
    registers,
    scratch,
    splat,
)
from llmc.targets.cpu.kernels.register_tiles import store_tile
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.layout import PANEL, stored_zero_point
from llmc.targets.cpu.parameters import TileParameters

Expr = Any


def integer_tiles(product: Product, x: CodedRows, count: Expr, params: TileParameters) -> None:
    """y = x · Wᵀ for `count` rows of activations."""
    weights = product.weights
    unit = unit_of(weights.fmt, x.block)
    depth = gcd(unit, amx.TILE_BYTES)

    def prepare(panels: list[Expr]) -> amx.Block:
        unpacked = scratch((len(panels), weights.k // 4, PANEL), "int32")
        for p, panel in enumerate(panels):
            _unpack(weights, panel, unpacked, p)

        def block(panels: list[Expr], first: Expr, groups: int, rows: Expr) -> None:
            _Block(product, x, unit, depth, unpacked, panels, first, groups, rows).multiply()

        return block

    amx.for_each_block(weights, count, weights.k, depth, params, prepare)


def _unpack(weights: WeightPanels, panel: Expr, into: Expr, p: int) -> None:
    """Four features' codes of 16 rows in every vector of `into[p]`."""
    width, zero = weights.width, stored_zero_point(weights.fmt)
    with T.serial(i64(weights.words)) as w:
        word = T.Bind(weights.word(i64(0), panel, w))
        for part in range(width // 4):
            codes = word
            if weights.fmt.bits == 4:
                shifted = T.shift_right(word, T.broadcast(T.int32(4 * part), PANEL))
                codes = T.bitwise_and(shifted, T.broadcast(T.int32(0x0F0F0F0F), PANEL))
            if zero:
                bytes_ = T.reinterpret("uint8x64", codes) - T.broadcast(T.uint8(zero), 64)
                codes = T.reinterpret("int32x16", bytes_)
            at = w * i64(width // 4) + i64(part)
            T.buffer_store(into, codes, [i64(p), at, lanes(i64(0))])


class _Block:
    """Rows × panels: sums in tiles within a unit, floats in the first-level cache across units."""

    def __init__(
        self,
        product: Product,
        x: CodedRows,
        unit: int,
        depth: int,
        unpacked: Expr,
        panels: list[Expr],
        first: Expr,
        groups: int,
        rows: Expr,
    ) -> None:
        self.product, self.weights, self.x = product, product.weights, x
        self.unit, self.depth, self.unpacked = unit, depth, unpacked
        self.panels, self.first, self.groups, self.rows = panels, first, groups, rows
        size = groups * amx.TILE_ROWS * len(panels)
        self.totals = registers(size)
        self.sums = T.alloc_buffer(
            [i64(size), i64(PANEL)],
            "int32",
            scope="local",
            annotations={"disable_lower_builtin": True},
        )

    def multiply(self) -> None:
        """Computes and stores all rows."""
        self._each(lambda row, p: self._put(row, p, splat(0.0)))
        with T.serial(i64(self.weights.k // self.unit)) as unit:
            self._sum(unit)
            self._add(unit)
        row_scales = self._scales(i64(0)) if not self.weights.fmt.group else []
        with T.serial(self.rows) as row:
            values = [self._total(row, p) for p in range(len(self.panels))]
            if row_scales:
                values = [v * s for v, s in zip(values, row_scales, strict=True)]
            store_tile(self.product, self.panels, [self.first + row], [values])

    def _sum(self, unit: Expr) -> None:
        """Σ code·x of a unit, for all rows and panels."""
        groups, panels = range(self.groups), range(len(self.panels))
        instruction = "tdpbsud" if self.weights.fmt.has_min else "tdpbssd"
        for g in groups:
            for p in panels:
                amx.clear(amx.sum_tile(g, p))
        with T.serial(i64(self.unit // self.depth)) as step:
            at = T.Bind(unit * i64(self.unit) + step * i64(self.depth))
            for p in panels:
                words = self.unpacked[i64(p), T.floordiv(at, i64(4)), i64(0)]
                amx.load(amx.weight_tile(p), T.address_of(words), amx.TILE_BYTES)
            for g in groups:
                codes = self.x.codes[i64(0), self.first + i64(g * amx.TILE_ROWS), at]
                amx.load(amx.activation_tile(g), T.address_of(codes), self.weights.k)
                for p in panels:
                    amx.multiply(instruction, g, p)
        for g in groups:
            for p in panels:
                row = self.sums[i64(g * amx.TILE_ROWS * len(self.panels) + p), i64(0)]
                stride = amx.TILE_BYTES * len(self.panels)
                amx.store(amx.sum_tile(g, p), T.address_of(row), stride)

    def _add(self, unit: Expr) -> None:
        """Adds the sums to the totals: a · (s · sum + min · Σx)."""
        fmt = self.weights.fmt
        scales = self._scales(unit) if fmt.group else []
        minimums = []
        if fmt.has_min:
            minimums = [T.Bind(self.weights.minimum(i64(0), p, unit)) for p in self.panels]
        block = T.Bind(T.floordiv(unit * i64(self.unit), i64(self.x.block)))

        with T.serial(self.rows) as row:
            position = self.first + row
            factor = T.Bind(self.x.scale(position, block))
            if minimums:
                whole = T.Cast("float32", self.x.sum(position, unit))
                plain = T.Bind(T.broadcast(whole, PANEL))
            for p in range(len(self.panels)):
                value = T.Cast(F32X16, self.sums[self._index(row, p), lanes(i64(0))])
                if scales:
                    value = value * scales[p]
                if minimums:
                    value = value + minimums[p] * plain
                self._put(row, p, self._total(row, p) + value * factor)

    def _scales(self, group: Expr) -> list[Expr]:
        return [T.Bind(self.weights.scale(i64(0), p, group)) for p in self.panels]

    def _each(self, action: Callable[[Expr, int], None]) -> None:
        with T.serial(self.rows) as row:
            for p in range(len(self.panels)):
                action(row, p)

    def _index(self, row: Expr, p: int) -> Expr:
        return row * i64(len(self.panels)) + i64(p)

    def _total(self, row: Expr, p: int) -> Expr:
        return self.totals[self._index(row, p), lanes(i64(0))]

    def _put(self, row: Expr, p: int, value: Expr) -> None:
        T.buffer_store(self.totals, value, [self._index(row, p), lanes(i64(0))])
