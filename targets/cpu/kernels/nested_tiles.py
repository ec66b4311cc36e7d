"""Products of a few activation rows in matrix registers, of weights whose scales are nested.

A weight is code · sub-scale · super-scale, and the product of the first two is a whole number.
Where that is what is multiplied, 256 features have one scale, and sums leave the tiles that much
less often than in `code_tiles`, where each group's do.

Both factors are numbers of two bytes then, x = 256 · x₁ + x₀ and w = 256 · w₁ + w₀, which a word
holds beside each other: rounding 256 activations to 16 bits by the largest of them loses nothing
that their bytes had. The tile products of activations' words (x₁, x₀) and weights' words (w₀, w₁)
add up x₁ · w₀ + x₀ · w₁, those of (0, x₁) add up x₁ · w₁. Of x₀ · w₀, 2^-16 of the largest, only
the mean is added, 127.5 · Σ x₀.

Tiles take weights' bytes unsigned, so that OFFSET is added to each weight, and taken off with the
mean as sums leave the tiles.

Two panels are multiplied side by side, a super-block of all panels of a task before the next one:
its activations then stay in the first-level cache.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import i64
from llmc.targets.cpu.kernels import amx, avx512
from llmc.targets.cpu.kernels.integer import CodedRows
from llmc.targets.cpu.kernels.math import fold_integers
from llmc.targets.cpu.kernels.outputs import rounded
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    WeightPanels,
    for_each_row,
    lanes,
    prefetch,
    scratch,
    splat,
)
from llmc.targets.cpu.kernels.register_tiles import slot_panel
from llmc.targets.cpu.kernels.tile_tasks import (
    code_bytes,
    first_bytes,
    for_each_column,
    in_each_byte,
    interleave,
    panels_of_a_task,
    row_groups,
    store_sums,
    store_totals,
    unit_addresses,
)
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.kernels.vector import named
from llmc.targets.cpu.layout import PANEL, sub_scale_planes
from llmc.targets.cpu.parameters import NestedTileParameters

Expr = Any
OFFSET = 1 << 13  # more than the largest |code · sub-scale|
_SUPER = 256  # features of a super-block
_STEP = 64  # features of a step
_STEPS = _SUPER // _STEP
_WORDS = _STEP // 4  # of four features' bytes
_SLOTS = 2  # places for unpacked steps: one is unpacked while the other is multiplied
_FIRST_OF_SUMS = (0, 0, 6, 11, 16)  # rows whose sums are added up beside each step of the next
_PARITIES = 2  # even features' words are a tile, and odd ones'


def takes_nested(fmt: WeightFormat, block: int) -> bool:
    """Whether products with activations of such blocks can be made here."""
    subs = fmt.sub_scales
    if subs is None or not subs.signed or sub_scale_planes(fmt) != (8,):
        return False
    return subs.group == _SUPER and _SUPER % block == 0


def nested_tiles(product: Product, x: CodedRows, count: Expr, params: NestedTileParameters) -> None:
    """y = x · Wᵀ for `count` rows, where `takes_nested` says so."""
    rows = _Rows.prepare(x, product.weights, count)
    width = panels_of_a_task(product, params.panels, params.min_columns, amx.PANELS)

    def column(first_slot: Expr, num_panels: Expr) -> None:
        _Task(
            product=product,
            rows=rows,
            params=params,
            first_slot=first_slot,
            num_panels=num_panels,
            unpacked=scratch((_SLOTS, amx.PANELS, _PARITIES, _WORDS, PANEL), "int32"),
            stored=scratch((amx.PANELS, 2, amx.TILE_ROWS, PANEL), "int32"),
            totals=scratch((width + amx.PANELS, amx.TILE_ROWS, PANEL)),
        ).emit(count)

    for_each_column(product, width, column)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Activations as words of two bytes, in the order in which tiles are loaded.

    Rows past the last are copies of it: what they make the registers compute is not stored.
    """

    words: Expr  # `[groups of 16 rows, (x₁, x₀) or (0, x₁), steps, odd, 16, 32]` int16
    scales: Expr  # `[groups, super-blocks, 16]`: of w₁ · x₀ and its like
    taken: Expr  # `[groups, super-blocks, 16]` int32: what is taken off the sums
    supers: int  # super-blocks of a row

    @classmethod
    def prepare(cls, x: CodedRows, weights: WeightPanels, count: Expr) -> _Rows:
        """Brings `count` rows of a product with the weights into it."""
        groups, supers = row_groups(count), weights.k // _SUPER
        tile = (amx.TILE_ROWS, _STEP // _PARITIES)
        rows = cls(
            words=scratch((groups, 2, supers * _STEPS, _PARITIES, *tile), "int16"),
            scales=scratch((groups, supers, amx.TILE_ROWS)),
            taken=scratch((groups, supers, amx.TILE_ROWS), "int32"),
            supers=supers,
        )
        for_each_row(
            groups * i64(supers),
            amx.TILE_ROWS * _SUPER,
            lambda number: rows._fill(x, number, count),
        )
        return rows

    def _fill(self, x: CodedRows, number: Expr, count: Expr) -> None:
        """A super-block of sixteen rows."""
        group = T.Bind(T.floordiv(number, i64(self.supers)))
        block = T.Bind(T.floormod(number, i64(self.supers)))
        with T.serial(i64(amx.TILE_ROWS)) as row:
            source = T.Bind(T.min(group * i64(amx.TILE_ROWS) + row, count - i64(1)))
            parts = _SUPER // x.block
            first = T.Bind(block * i64(parts))
            scales = [T.Bind(x.scales[i64(0), source, first + i64(p)]) for p in range(parts)]
            largest = scales[0]
            for scale in scales[1:]:
                largest = T.max(largest, scale)
            largest = T.Bind(largest)
            inverse = T.Bind(T.float32(256) / T.max(largest, T.float32(2.0**-120)))
            wholes, lows = (T.broadcast(T.int32(0), PANEL) for _ in range(2))
            for start in range(0, _SUPER, PANEL):
                factor = T.broadcast(scales[start // x.block] * inverse, PANEL)
                value = x.values(source, block * i64(_SUPER) + i64(start)) * factor
                whole = T.Bind(rounded(value))
                eight = T.broadcast(T.int32(8), PANEL)
                high = whole + T.broadcast(T.int32(128), PANEL)
                high = T.Bind(T.shift_right(high, eight))
                wholes = T.Bind(wholes + whole)
                lows = T.Bind(lows + whole - T.shift_left(high, eight))
                high = T.bitwise_and(high, T.broadcast(T.int32(255), PANEL))
                both = T.bitwise_or(T.shift_left(whole, eight), high)
                step = T.Bind(block * i64(_STEPS) + i64(start // _STEP))
                at = start % _STEP // _PARITIES
                for kind, words in enumerate((both, T.shift_left(high, eight))):
                    pairs = T.reinterpret("int32x8", T.Cast("int16x16", T.Bind(words)))
                    odd = T.shift_right(pairs, T.broadcast(T.int32(16), PANEL // 2))
                    for parity, found in enumerate((pairs, odd)):
                        place = T.ramp(i64(at), i64(1), PANEL // _PARITIES)
                        index = [group, i64(kind), step, i64(parity), row, place]
                        T.buffer_store(self.words, T.Cast("int16x8", found), index)
            total, low = (T.Bind(fold_integers("add", values)) for values in (wholes, lows))
            # In units of 256, as the sums are.
            mean = T.shift_right(low * T.int32(255), T.int32(9))
            T.buffer_store(self.taken, total * T.int32(OFFSET // 256) - mean, [group, block, row])
            T.buffer_store(self.scales, largest, [group, block, row])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """All rows × a few panels, sixteen rows at a time; two panels of a super-block are a turn."""

    product: Product
    rows: _Rows
    params: NestedTileParameters
    first_slot: Expr  # panels are counted as in tile_tasks
    num_panels: Expr
    unpacked: Expr  # `[slots, panels, parities, 16, 16]` int32: two features' words of 16 outputs
    stored: Expr  # `[panels, 2, 16, 16]` int32: a turn's sums, the smaller ones first
    totals: Expr  # `[panels, 16, 16]`, two of them for what is computed before there is a turn

    def emit(self, count: Expr) -> None:
        """Multiplies and stores them."""
        with T.serial(self.rows.words.shape[0]) as group:
            with T.serial(self.num_panels) as place:
                for row in range(amx.TILE_ROWS):
                    T.buffer_store(self.totals, splat(0.0), [place, i64(row), lanes(i64(0))])
            amx.configure(amx.TILE_BYTES)
            last = T.Bind(self._pairs * i64(self.rows.supers) - i64(1))
            interleave([self._unpack(i64(0), 0, last)])
            with T.serial(last + i64(1)) as turn:
                following = T.Bind(T.min(turn + i64(1), last))
                before = T.Bind(T.max(turn - i64(1), i64(0)))
                for step in range(_STEPS):
                    if step == 0:
                        self._store()
                    unpacks = turn if step + 1 < _STEPS else following
                    interleave(
                        [
                            self._unpack(unpacks, (step + 1) % _STEPS, last),
                            self._multiply(group, turn, step),
                            self._sum(group, before, step, none_yet=turn == i64(0)),
                        ]
                    )
            self._store()
            for step in range(_STEPS):
                interleave([self._sum(group, last, step)])
            amx.release()
            first = T.Bind(group * i64(amx.TILE_ROWS))
            rows = first, T.min(i64(amx.TILE_ROWS), count - first)
            store_totals(self.product, rows, (self.first_slot, self.num_panels), self.totals)

    @property
    def _pairs(self) -> Expr:
        return T.floordiv(self.num_panels + i64(amx.PANELS - 1), i64(amx.PANELS))

    def _place(self, turn: Expr) -> tuple[Expr, Expr]:
        """(place of the first panel, super-block) of a turn."""
        place = named(T.floormod(turn, self._pairs) * i64(amx.PANELS))
        return place, named(T.floordiv(turn, self._pairs))

    def _panels(self, place: Expr) -> list[Expr]:
        """The panels from a place on; one that is missing repeats the last."""
        last = self.num_panels - i64(1)
        slots = [self.first_slot + T.min(place + i64(p), last) for p in range(amx.PANELS)]
        return [named(slot_panel(self.product, slot)) for slot in slots]

    def _unpack(self, turn: Expr, step: int, last: Expr) -> Iterator[None]:
        """A step's weights as words, and asks for those of a later step."""
        weights, fmt = self.product.weights, self.product.weights.fmt
        place, block = self._place(turn)
        panels = self._panels(place)
        number = T.Bind(block * i64(_STEPS) + i64(step))
        turns, later = divmod(step + self.params.ahead, _STEPS)
        place, block = self._place(T.Bind(T.min(turn + i64(turns), last)))
        later_number = T.Bind(block * i64(_STEPS) + i64(later))
        asked = [unit_addresses(weights, p, later_number, _STEP) for p in self._panels(place)]
        addresses = [address for of_panels in zip(*asked, strict=True) for address in of_panels]
        words = fmt.group // 4
        for group in range(_STEP // fmt.group):
            for p, panel in enumerate(panels):
                index = T.Bind(number * i64(_STEP // fmt.group) + i64(group))
                factors, offset = self._factors(panel, index)
                for word in range(group * words, (group + 1) * words):
                    codes = T.reinterpret(
                        avx512.INT8, code_bytes(weights, panel, number, _WORDS, word, 0)
                    )
                    for parity, factor in enumerate(factors):
                        found = avx512.multiply_add_bytes(T.Bind(codes), factor) + offset
                        at = [i64(step % _SLOTS), i64(p), i64(parity), i64(word), lanes(i64(0))]
                        T.buffer_store(self.unpacked, T.reinterpret("int32x16", found), at)
                    if addresses:
                        prefetch(addresses.pop(0), self.params.ahead_cache)
                    if word % 2:
                        yield
        for address in addresses:
            prefetch(address, self.params.ahead_cache)

    def _factors(self, panel: Expr, group: Expr) -> tuple[list[Expr], Expr]:
        """A group's sub-scales beside zeros, int8x64, for even and for odd features' codes; and
        what else makes their products words, int16x32.
        """
        fmt = self.product.weights.fmt
        sub = self.product.weights.buffers["sub_scales"][panel, group, lanes(i64(0))]
        wide = T.reinterpret(avx512.INT8, T.Cast("int32x16", sub))
        every = tirx.Shuffle([wide], [i64(i // 4 * 4) for i in range(4 * PANEL)])
        signed = T.reinterpret("int32x16", every)
        signed = T.Bind(T.bitwise_xor(signed, in_each_byte(0x80)))
        even = T.bitwise_and(signed, T.broadcast(T.int32(0x00FF00FF), PANEL))
        odd = T.Bind(T.bitwise_and(signed, T.broadcast(T.int32(-0x00FF0100), PANEL)))
        # 256 · sub-scale, of which the codes' zero point is a power of two less.
        zero = T.reinterpret(avx512.INT16, odd)
        zero = T.shift_right(zero, T.broadcast(T.int16(8 - (fmt.code_bits - 1)), avx512.HALVES))
        offset = T.Bind(T.broadcast(T.int16(OFFSET), avx512.HALVES) - zero)
        return [T.Bind(T.reinterpret(avx512.INT8, part)) for part in (even, odd)], offset

    def _multiply(self, group: Expr, turn: Expr, step: int) -> Iterator[None]:
        """Adds a step to the sums."""
        _, block = self._place(turn)
        number = T.Bind(block * i64(_STEPS) + i64(step))
        if step == 0:
            for p in range(amx.PANELS):
                for kind in range(2):
                    amx.clear(amx.sum_tile(kind, p))
        for parity in range(_PARITIES):
            for kind in range(2):
                yield
                words = first_bytes(self.rows.words, group, i64(kind), number, i64(parity))
                amx.load(amx.activation_tile(kind), words, amx.TILE_BYTES)
                for p in range(amx.PANELS):
                    w = amx.weight_tile(p)
                    if kind == 0:
                        slot = i64(step % _SLOTS), i64(p), i64(parity)
                        amx.load(w, first_bytes(self.unpacked, *slot), amx.TILE_BYTES)
                    yield
                    tiles = amx.sum_tile(kind, p), amx.activation_tile(kind), w
                    amx.multiply("tdpbsud", *tiles)
                    yield

    def _store(self) -> None:
        """Ends a turn's sums."""
        for p in range(amx.PANELS):
            for kind in range(2):
                store_sums(amx.sum_tile(kind, p), self.stored, i64(p), i64(kind))

    def _sum(
        self, group: Expr, turn: Expr, step: int, none_yet: Expr | None = None
    ) -> Iterator[None]:
        """Adds some rows' sums of a turn to the totals."""
        rows = range(_FIRST_OF_SUMS[step], _FIRST_OF_SUMS[step + 1])
        place, block = self._place(turn)
        panels = self._panels(place)
        if none_yet is not None:
            place = named(T.Select(none_yet, self.totals.shape[0] - i64(amx.PANELS), place))
        for p, panel in enumerate(panels):
            scale = self.product.weights.buffers["scales"][panel, block, lanes(i64(0))]
            scale = T.Bind(T.Cast(F32X16, scale))
            for row in rows:
                low, high = (
                    self.stored[i64(p), i64(kind), i64(row), lanes(i64(0))] for kind in range(2)
                )
                taken = T.broadcast(self.rows.taken[group, block, i64(row)], PANEL)
                value = T.shift_left(high, T.broadcast(T.int32(8), PANEL)) + low - taken
                value = T.Cast(F32X16, value) * scale
                of_row = T.broadcast(self.rows.scales[group, block, i64(row)], PANEL)
                at = [place + i64(p), i64(row), lanes(i64(0))]
                T.buffer_store(self.totals, self.totals[tuple(at)] + value * of_row, at)
                yield
