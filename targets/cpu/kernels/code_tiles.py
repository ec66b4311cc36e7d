"""Products of a few activation rows in matrix registers, with weight codes as they are.

`bfloat16_tiles` multiplies every weight by its scale before it becomes bfloat16, which pays where
many rows share it. Here a code becomes bfloat16 by one look-up in a register, exactly, and the sums
of a group of features are scaled when they leave the tile: one fused multiply-add for each row of
sixteen outputs.

Tiles are slow to answer, so several groups are under way at once: while one is unpacked, the one
before it is multiplied, an earlier one is stored, and what was stored before is added up.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.bfloat16_tiles import tile_activations, tile_depth
from llmc.targets.cpu.kernels.integer import CodedRows
from llmc.targets.cpu.kernels.panels import (
    get,
    i64,
    lanes,
    prefetch,
    put,
    registers,
    scratch,
    splat,
)
from llmc.targets.cpu.kernels.register_tiles import slot_panel, store_slots
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.layout import PANEL, ceildiv, codes_per_word, stored_zero_point
from llmc.targets.cpu.parameters import CodeTileParameters

Expr = Any
_TABLE = 32  # 16-bit entries of a vector register
_SUM_TILES = 4
_STORED = 4  # groups whose sums wait in memory


def takes(fmt: WeightFormat, m: int, k: int, params: CodeTileParameters) -> bool:
    """Whether products with a matrix `[m, k]` of the format are made here."""
    if m * k < params.least_weights:
        return False
    if fmt.is_float or fmt.codebook is not None or fmt.code_bits > 6 or not fmt.group:
        return False
    return tile_depth(fmt.group) % PANEL == 0 and _chunk(fmt, k, params) >= params.least_groups


def code_tiles(product: Product, x: CodedRows, count: Expr, params: CodeTileParameters) -> None:
    """y = x · Wᵀ for `count` rows, where the format is one that this `takes`."""
    weights = product.weights
    fmt = weights.fmt
    depth = tile_depth(fmt.group)
    blocks = T.Bind(T.floordiv(count + i64(amx.TILE_ROWS - 1), i64(amx.TILE_ROWS)))
    activations = scratch((blocks, weights.k // depth, amx.TILE_ROWS, depth), "uint16")
    sums = scratch((blocks, weights.groups, amx.TILE_ROWS)) if fmt.has_min else None
    _prepare(activations, sums, x, fmt, count, blocks * i64(amx.TILE_ROWS))

    width = params.panels
    if product.gated is not None:
        width = ceildiv(width, 2 * product.gated.panels) * 2 * product.gated.panels
    with T.parallel(i64(ceildiv(weights.panels, width))) as column:
        first = T.Bind(column * i64(width))
        _Task(
            product=product,
            params=params,
            activations=activations,
            sums=sums,
            depth=depth,
            first_slot=first,
            num_panels=T.Bind(T.min(i64(width), i64(weights.panels) - first)),
            unpacked=scratch((params.unpack_lead + 1, fmt.group // 2, PANEL), "int32"),
            stored=scratch((_STORED, amx.TILE_ROWS, PANEL)),
            totals=scratch((width, amx.TILE_ROWS, PANEL)),
            table=[T.Bind(part) for part in _table(fmt)],
        ).emit(count, blocks)


def _chunk(fmt: WeightFormat, k: int, params: CodeTileParameters) -> int:
    """Groups of a chunk: the most that divide a row's."""
    groups = k // fmt.group
    most = max(1, params.features // fmt.group)
    return max(n for n in range(1, most + 1) if groups % n == 0)


def _fields(fmt: WeightFormat) -> list[tuple[int, tuple[int, int]]]:
    """How codes leave a word: the shift of its halves of 16 bits, and the two features that are
    then their lowest bits.
    """
    if codes_per_word(fmt) == 8:
        return [(0, (0, 2)), (4, (4, 6)), (8, (1, 3)), (12, (5, 7))]
    return [(0, (0, 2)), (8, (1, 3))]


def _offset(fmt: WeightFormat) -> int:
    """What is taken off a code as stored: codes around zero lose least when they are summed."""
    return 1 << (fmt.code_bits - 1) if fmt.has_min else stored_zero_point(fmt)


def _table(fmt: WeightFormat) -> list[Expr]:
    """bfloat16 of every code less the offset, in one or two vectors; bits above a code's, which
    belong to the next one, do not matter.
    """
    codes = np.arange(2 * _TABLE if fmt.code_bits == 6 else _TABLE) % (1 << fmt.code_bits)
    values = (codes - _offset(fmt)).astype(ml_dtypes.bfloat16).view(np.int32)
    words = [T.int32(int(word)) for word in values]
    parts = [words[i : i + PANEL] for i in range(0, len(words), PANEL)]
    return [T.reinterpret("int16x32", tirx.Shuffle(part, list(range(PANEL)))) for part in parts]


def _prepare(
    tiles: Expr, sums: Expr | None, x: CodedRows, fmt: WeightFormat, count: Expr, rows: Expr
) -> None:
    """Rows in the order of the codes, and what a group of each adds up to.

    The last row stands for missing ones, which nobody reads: old bits may read as denormal numbers,
    which take long.
    """
    width = codes_per_word(fmt)
    order = [f for _, pair in _fields(fmt) for f in pair]
    order = [word + f for word in range(0, PANEL, width) for f in order]

    def source(row: Expr) -> Expr:
        return T.min(row, count - i64(1))

    def values(row: Expr, first: Expr) -> Expr:
        return tirx.Shuffle([T.Bind(x.bfloat16(source(row), first))], order)

    tile_activations(tiles, values, rows)
    if sums is None:
        return
    with T.parallel(rows) as row:
        block = T.Bind(T.floordiv(row, i64(amx.TILE_ROWS)))
        place = T.Bind(T.floormod(row, i64(amx.TILE_ROWS)))
        with T.serial(sums.shape[1]) as group:
            of_block = T.floordiv(group, i64(x.block // fmt.group))
            total = T.Cast("float32", x.sum(source(row), group))
            total = total * x.scales[i64(0), source(row), of_block]
            T.buffer_store(sums, total, [block, group, place])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """All rows × a few panels, sixteen rows at a time."""

    product: Product
    params: CodeTileParameters
    activations: Expr  # `[blocks, steps, 16, depth]` uint16
    sums: Expr | None  # `[blocks, groups, 16]`
    depth: int
    first_slot: Expr  # panels are counted as in bfloat16_tiles
    num_panels: Expr
    unpacked: Expr  # `[slots, group / 2, 16]` int32: the codes of the groups under way
    stored: Expr  # `[slots, 16, 16]`: their sums
    totals: Expr  # `[panels, 16, 16]`
    table: list[Expr]

    def emit(self, count: Expr, blocks: Expr) -> None:
        """Multiplies and stores them. A chunk's activations stay in the first-level cache while
        the panels pass.
        """
        weights = self.product.weights
        chunk = _chunk(weights.fmt, weights.k, self.params)
        amx.configure(2 * self.depth)
        with T.serial(blocks) as block:
            with T.serial(i64(weights.groups // chunk)) as number:
                start = T.Bind(number * i64(chunk))
                with T.serial(self.num_panels) as p:
                    self._add(block, start, p, chunk)
            first = T.Bind(block * i64(amx.TILE_ROWS))
            with T.serial(T.min(i64(amx.TILE_ROWS), count - first)) as row:
                store_slots(
                    self.product,
                    first + row,
                    self.first_slot,
                    self.num_panels,
                    lambda slot: self.totals[slot, row, lanes(i64(0))],
                )
        amx.release()

    def _add(self, block: Expr, start: Expr, p: Expr, chunk: int) -> None:
        """Adds a chunk's groups to the totals of a panel."""
        params = self.params
        totals = registers(amx.TILE_ROWS)
        for row in range(amx.TILE_ROWS):
            before = self.totals[p, i64(row), lanes(i64(0))]
            put(totals, row, T.Select(start == i64(0), splat(0.0), before))
        panel = T.Bind(slot_panel(self.product, self.first_slot + p))
        following = self._following(start, p, chunk)
        stages: list[tuple[int, Callable[[int], None]]] = [
            (-params.unpack_lead, lambda g: self._unpack(panel, start, g, following)),
            (0, lambda g: self._multiply(block, start, g)),
            (params.store_lag, self._store),
            (params.sum_lag, lambda g: self._sum(totals, block, panel, start, g)),
        ]
        for time in range(-params.unpack_lead, chunk + params.sum_lag):
            for lag, stage in stages:
                if 0 <= time - lag < chunk:
                    stage(time - lag)
        for row in range(amx.TILE_ROWS):
            T.buffer_store(self.totals, get(totals, row), [p, i64(row), lanes(i64(0))])

    def _following(self, start: Expr, p: Expr, chunk: int) -> tuple[Expr, Expr]:
        """Panel and first group of what is multiplied next: behind the last panel its next chunk,
        or what another task begins with.
        """
        weights = self.product.weights
        ahead = p + i64(1)
        over = ahead >= self.num_panels
        after = start + i64(chunk)
        ends = after >= i64(weights.groups)
        slot = ahead - T.Select(tirx.And(over, tirx.Not(ends)), self.num_panels, i64(0))
        group = T.Select(over, T.Select(ends, i64(0), after), start)
        return T.Bind(slot_panel(self.product, self.first_slot + slot)), T.Bind(group)

    def _unpack(self, panel: Expr, start: Expr, g: int, following: tuple[Expr, Expr]) -> None:
        """A group's codes as pairs of bfloat16, and asks for as many of the panel that follows."""
        weights = self.product.weights
        fmt = weights.fmt
        words = fmt.group // codes_per_word(fmt)
        slot = i64(g % (self.params.unpack_lead + 1))
        fields = _fields(fmt)
        next_panel, next_start = following
        prefetch(weights.scale_address(i64(0), next_panel, next_start + i64(g)), cache=2)
        for number in range(words):
            if number % weights.words_per_line == 0:
                word = (next_start + i64(g)) * i64(words) + i64(number)
                prefetch(weights.word_address(i64(0), next_panel, word), cache=2)
            word = T.Bind(weights.word(i64(0), panel, (start + i64(g)) * i64(words) + i64(number)))
            halves = T.reinterpret("uint16x32", word)
            for i, (shift, _) in enumerate(fields):
                codes = halves
                if shift:
                    codes = T.shift_right(halves, T.broadcast(T.uint16(shift), 2 * PANEL))
                pairs = T.reinterpret("int32x16", self._look_up(T.reinterpret("int16x32", codes)))
                row = i64(number * len(fields) + i)
                T.buffer_store(self.unpacked, pairs, [slot, row, lanes(i64(0))])

    def _look_up(self, codes: Expr) -> Expr:
        if len(self.table) == 1:
            name, operands = "permvar.hi.512", (self.table[0], codes)
        else:
            name, operands = "vpermi2var.hi.512", (self.table[0], codes, self.table[1])
        return T.call_llvm_pure_intrin("int16x32", f"llvm.x86.avx512.{name}", *operands)

    def _multiply(self, block: Expr, start: Expr, g: int) -> None:
        """Starts a group's sums."""
        steps = self.product.weights.fmt.group // self.depth
        sums = g % _SUM_TILES
        slot = i64(g % (self.params.unpack_lead + 1))
        amx.clear(sums)
        for step in range(steps):
            turn = (g * steps + step) % 2
            x = self.activations[block, (start + i64(g)) * i64(steps) + i64(step), i64(0), i64(0)]
            amx.load(amx.activation_tile(turn), T.address_of(x), 2 * self.depth)
            codes = self.unpacked[slot, i64(step * self.depth // 2), i64(0)]
            amx.load(amx.weight_tile(turn), T.address_of(codes), amx.TILE_BYTES)
            amx.multiply("tdpbf16ps", sums, amx.activation_tile(turn), amx.weight_tile(turn))

    def _store(self, g: int) -> None:
        at = self.stored[i64(g % _STORED), i64(0), i64(0)]
        amx.store(g % _SUM_TILES, T.address_of(at), amx.TILE_BYTES)

    def _sum(self, totals: Expr, block: Expr, panel: Expr, start: Expr, g: int) -> None:
        """Adds scale · Σ (code - offset)·x + minimum · Σ x of a group."""
        weights = self.product.weights
        group = start + i64(g)
        scale = T.Bind(weights.scale(i64(0), panel, group))
        minimum = None
        if self.sums is not None:
            offset = splat(float(_offset(weights.fmt) - stored_zero_point(weights.fmt)))
            minimum = T.Bind(weights.minimum(i64(0), panel, group) + scale * offset)
        for row in range(amx.TILE_ROWS):
            found = self.stored[i64(g % _STORED), i64(row), lanes(i64(0))]
            total = get(totals, row) + scale * found
            if minimum is not None:
                x = T.broadcast(self.sums[block, group, i64(row)], PANEL)
                total = total + minimum * x
            put(totals, row, total)
