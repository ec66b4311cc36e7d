"""Activations in the order in which register tiles read them.

A tile multiplies a few rows' values of the same feature. In rows as they come, whose lengths are
mostly multiples of the caches' banks, those cannot be read at the same time; here they lie beside
each other.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels.panels import Rows, for_each_row, scratch

Expr = Any


@dataclass(frozen=True, slots=True)
class InterleavedRows:
    """`values[tile, feature, row of the tile]`; rows past the last are copies of it."""

    values: Expr

    @classmethod
    def of(cls, x: Rows, count: Expr, features: int, size: int) -> InterleavedRows:
        """`count` rows in tiles of `size`."""
        tiles = T.Bind(T.floordiv(count + i64(size - 1), i64(size)))
        values = scratch((tiles, features, size))

        def fill(tile: Expr) -> None:
            first = T.Bind(tile * i64(size))
            rows = [T.Bind(T.min(first + i64(r), count - i64(1))) for r in range(size)]
            with T.serial(i64(features)) as feature:
                for r, row in enumerate(rows):
                    T.buffer_store(values, x.at(row, feature), [tile, feature, i64(r)])

        for_each_row(tiles, size * features, fill)
        return cls(values)

    def reader(self, first: Expr) -> Callable[[int, Expr], Expr]:
        """value(r, feature) of row `first` + r, for rows of one tile."""
        size = self.values.shape[2]
        tile, place = T.Bind(T.floordiv(first, size)), T.Bind(T.floormod(first, size))
        return lambda r, feature: self.values[tile, feature, place + i64(r)]
