"""Products of up to sixteen rows of bfloat16 in matrix registers, weights straight from memory.

What `bfloat16_tiles` does for many rows is done here as memory likes it: four panels are read side
by side, each from its beginning to its end, and their sums stay in four tiles all the way.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.bfloat16_tiles import Values, tile_depth
from llmc.targets.cpu.kernels.panels import for_each_row, lanes, prefetch, scratch
from llmc.targets.cpu.kernels.register_tiles import slot_panel
from llmc.targets.cpu.kernels.tile_tasks import (
    first_bytes,
    for_each_column,
    panels_of_a_task,
    store_sums,
    store_totals,
)
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import FewTileParameters

Expr = Any
_STREAMS = 4  # panels that are read side by side: tiles for their sums


def bfloat16_few(product: Product, values: Values, count: Expr, params: FewTileParameters) -> None:
    """y = x · Wᵀ for `count` rows of activations, at most sixteen; k is a multiple of 16."""
    weights = product.weights
    depth = tile_depth(weights.k)
    activations = scratch((weights.k // depth, amx.TILE_ROWS, depth), "uint16")
    _fill(activations, values, count)
    width = panels_of_a_task(product, params.panels, params.min_columns)

    def column(first_slot: Expr, num_panels: Expr) -> None:
        _Task(
            product=product,
            activations=activations,
            depth=depth,
            ahead=params.ahead,
            first_slot=first_slot,
            num_panels=num_panels,
            totals=scratch((ceildiv(width, _STREAMS) * _STREAMS, amx.TILE_ROWS, PANEL)),
        ).emit(count)

    for_each_column(product, width, column)


def _fill(tiles: Expr, values: Values, count: Expr) -> None:
    """Puts rows into tiles `[steps, 16, depth]`, copies of the last where there are too few: old
    bits may read as denormal numbers, which take long.
    """
    steps, depth = int(tiles.shape[0]), int(tiles.shape[2])

    def fill(step: Expr) -> None:
        with T.serial(i64(amx.TILE_ROWS)) as row:
            source = T.Bind(T.min(row, count - i64(1)))
            for part in range(0, depth, PANEL):
                found = values(source, step * i64(depth) + i64(part))
                T.buffer_store(tiles, found, [step, row, lanes(i64(part))])

    for_each_row(i64(steps), amx.TILE_ROWS * depth, fill)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """All rows × a few panels."""

    product: Product
    activations: Expr  # `[steps, 16, depth]` uint16
    depth: int
    ahead: int
    first_slot: Expr  # panels are counted as in tile_tasks
    num_panels: Expr
    totals: Expr  # `[panels, 16, 16]`

    def emit(self, count: Expr) -> None:
        """Multiplies and stores them."""
        amx.configure(2 * self.depth)
        rounds = T.floordiv(self.num_panels + i64(_STREAMS - 1), i64(_STREAMS))
        with T.serial(rounds) as number:
            self._multiply(T.Bind(number * i64(_STREAMS)))
        amx.release()
        slots = self.first_slot, self.num_panels
        store_totals(self.product, (i64(0), count), slots, self.totals)

    def _multiply(self, slot: Expr) -> None:
        """Leaves the totals of the panels in slots `slot`, `slot + 1` …"""
        panels = [self._panel(slot + i64(p)) for p in range(_STREAMS)]
        following = [self._panel(slot + i64(_STREAMS + p)) for p in range(_STREAMS)]
        for p in range(_STREAMS):
            amx.clear(p)
        steps = int(self.activations.shape[0])
        with T.serial(i64(steps // 2)) as pair:
            for turn in range(2):
                self._step(T.Bind(pair * i64(2) + i64(turn)), turn, panels, following)
        if steps % 2:
            self._step(i64(steps - 1), 0, panels, following)
        for p in range(_STREAMS):
            store_sums(p, self.totals, slot + i64(p))

    def _panel(self, slot: Expr) -> Expr:
        """The panel of a slot of the task, the last one for those behind it."""
        slot = T.min(slot, self.num_panels - i64(1))
        return T.Bind(slot_panel(self.product, self.first_slot + slot))

    def _step(self, step: Expr, turn: int, panels: list[Expr], following: list[Expr]) -> None:
        """Adds the products of a tile's depth of features."""
        weights, words = self.product.weights, self.depth // 2
        steps = i64(int(self.activations.shape[0]))
        over = T.Bind(step + i64(self.ahead) >= steps)
        ahead = T.Bind(step + i64(self.ahead) - T.Select(over, steps, i64(0)))
        activations = amx.activation_tile(turn)
        amx.load(activations, first_bytes(self.activations, step), 2 * self.depth)
        for p, (panel, after) in enumerate(zip(panels, following, strict=True)):
            next_panel = T.Bind(T.Select(over, after, panel))
            for w in range(words):
                word = ahead * i64(words) + i64(w)
                prefetch(weights.word_address(i64(0), next_panel, word))
            tile = amx.weight_tile(p % 2)
            amx.load(tile, weights.word_address(i64(0), panel, step * i64(words)), amx.TILE_BYTES)
            amx.multiply("tdpbf16ps", p, activations, tile)
