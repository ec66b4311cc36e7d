"""Products of a few activation rows in matrix registers, with the codes of weights as they are.

`byte_tiles` brings all features of a chunk to one scale first, which pays where many rows share it.
Here codes are multiplied as bytes in *units*, features whose activations share a scale, and the
parts of one whose weights do; what a part adds up to is exact, and is scaled as it leaves the tile.

Tiles are slow to answer, so several units are under way at once: while one is multiplied, a later
one is unpacked, and what earlier ones came to is stored and added up. A row of weights is read in
several places in turns: a processor asks memory for more lines ahead of several streams than of
one.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import i64
from llmc.targets.cpu.kernels import amx, avx512
from llmc.targets.cpu.kernels.integer import CodedRows
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    WHOLE,
    WHOLE_BITS,
    WeightPanels,
    for_each_row,
    get,
    lanes,
    prefetch,
    put,
    registers,
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
from llmc.targets.cpu.layout import PANEL, ceildiv
from llmc.targets.cpu.parameters import CodeTileParameters

Expr = Any
_TURNS = 4  # units of a step of the loop over them, and tiles for their sums
_SLOTS = 4  # places in memory for what one stage leaves to the next
_UNPACK, _STORE, _SUM = -2, 2, 3  # when a unit is, counted from when it is multiplied
_LINE = 32  # features whose bits fill whole words in every plane
_STORE_PARTS = 1  # and where a unit has two sums, which takes all tiles in two turns


def takes(fmt: WeightFormat, block: int) -> bool:
    """Whether products with activations of such blocks can be made here."""
    if fmt.is_float or _parts(fmt, block) > _TURNS // 2:
        return False
    return fmt.planes == (fmt.bits,) or block % _LINE == 0


def code_tiles(product: Product, x: CodedRows, count: Expr, params: CodeTileParameters) -> None:
    """y = x · Wᵀ for `count` rows, where `takes` says so."""
    weights = product.weights
    rows = _Rows.prepare(x, weights, count)
    width = panels_of_a_task(product, params.panels, params.min_columns)

    def column(first_slot: Expr, num_panels: Expr) -> None:
        _Task(
            product=product,
            rows=rows,
            streams=_Streams.of(rows.units, len(weights.fmt.planes), params),
            first_slot=first_slot,
            num_panels=num_panels,
            unpacked=scratch((_SLOTS, rows.unit // 4, PANEL), "int32"),
            stored=scratch((_SLOTS, rows.parts, amx.TILE_ROWS, PANEL), "int32"),
            totals=scratch((width, amx.TILE_ROWS, PANEL)),
        ).emit(count)

    with avx512.with_products():
        for_each_column(product, width, column)


def _bits(fmt: WeightFormat) -> int:
    """Of a code as it is multiplied."""
    return 8 if fmt.codebook is not None else fmt.code_bits


def _offset(fmt: WeightFormat) -> int:
    """What is taken off an unsigned code so that it is a signed one."""
    return 1 << (_bits(fmt) - 1)


def _parts(fmt: WeightFormat, block: int) -> int:
    """Groups of weights that share an activation scale."""
    return block // fmt.group if fmt.group else 1


def _shift(fmt: WeightFormat) -> int:
    """Bits below a code in its byte: it is taken as the upper part of one, which costs less than to
    make it a signed byte.
    """
    return 8 - _bits(fmt)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Activations in the order in which tiles are loaded.

    Rows past the last are copies of it: what they make the registers compute is not stored.
    """

    unit: int  # features that share a scale
    units: int  # of a row
    parts: int  # of a unit: groups of weights
    depth: int  # features of a tile
    codes: Expr  # `[groups of 16 rows, steps, 16, depth]` int8
    scales: Expr  # `[groups of 16 rows, units, 16]`
    sums: Expr | None  # `[groups of 16 rows, units · parts, 16]`: Σ x, where weights have minimums

    @classmethod
    def prepare(cls, x: CodedRows, weights: WeightPanels, count: Expr) -> _Rows:
        """Brings `count` rows of a product with the weights into it."""
        unit, parts = x.block, _parts(weights.fmt, x.block)
        depth = gcd(unit // parts, amx.TILE_BYTES)
        groups, units = row_groups(count), weights.k // unit
        sums = None
        if weights.fmt.has_min:
            sums = scratch((groups, units * parts, amx.TILE_ROWS))
        rows = cls(
            unit=unit,
            units=units,
            parts=parts,
            depth=depth,
            codes=scratch((groups, weights.k // depth, amx.TILE_ROWS, depth), "int8"),
            scales=scratch((groups, units, amx.TILE_ROWS)),
            sums=sums,
        )
        for_each_row(
            groups * i64(units),
            amx.TILE_ROWS * unit,
            lambda number: rows._fill(x, weights.fmt, number, count),
        )
        return rows

    def _fill(self, x: CodedRows, fmt: WeightFormat, number: Expr, count: Expr) -> None:
        """A unit of sixteen rows."""
        group = T.Bind(T.floordiv(number, i64(self.units)))
        unit = T.Bind(T.floormod(number, i64(self.units)))
        steps = self.unit // self.depth
        with T.serial(i64(amx.TILE_ROWS)) as row:
            source = T.Bind(T.min(group * i64(amx.TILE_ROWS) + row, count - i64(1)))
            for i in range(steps):
                step = unit * i64(steps) + i64(i)
                found = x.codes[i64(0), source, T.ramp(step * i64(self.depth), i64(1), self.depth)]
                at = [group, step, row, T.ramp(i64(0), i64(1), self.depth)]
                T.buffer_store(self.codes, found, at)
            scale = T.Bind(x.scales[i64(0), source, unit])
            shifted = scale * T.float32(2.0 ** -_shift(fmt))
            T.buffer_store(self.scales, shifted, [group, unit, row])
            if self.sums is not None:
                for i in range(self.parts):
                    part = unit * i64(self.parts) + i64(i)
                    total = T.Cast("float32", x.sum(source, part)) * scale
                    T.buffer_store(self.sums, total, [group, part, row])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streams:
    """In which order a row's units are multiplied: one of each stream in turns."""

    units: int
    count: int
    ahead: int  # units of a stream that are asked for before they are unpacked

    @classmethod
    def of(cls, units: int, planes: int, params: CodeTileParameters) -> _Streams:
        """As many streams as divide the units, of 1, 2 and 4; each plane of codes is one itself."""
        count = gcd(units, max(1, params.streams // planes))
        return cls(units=units, count=count, ahead=min(params.ahead, units // count))

    def place(self, step: Expr, turn: int) -> tuple[Expr, Expr]:
        """(first unit of the stream, number in it) of a turn of a step."""
        first = i64(turn % self.count * (self.units // self.count))
        return first, step * i64(_TURNS // self.count) + i64(turn // self.count)

    def unit(self, step: Expr, turn: int) -> Expr:
        """The unit that is multiplied then."""
        first, number = self.place(step, turn)
        return T.Bind(first + number)

    def next(self, step: Expr, turn: int) -> tuple[Expr, Expr]:
        """(whether it belongs to the row that follows, its unit) of what is asked for then."""
        first, number = self.place(step, turn)
        length = i64(self.units // self.count)
        ahead = T.Bind(number + i64(self.ahead))
        over = T.Bind(ahead >= length)
        return over, T.Bind(first + ahead - T.Select(over, length, i64(0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """All rows × a few panels, sixteen rows at a time."""

    product: Product
    rows: _Rows
    streams: _Streams
    first_slot: Expr  # panels are counted as in tile_tasks
    num_panels: Expr
    unpacked: Expr  # `[slots, unit / 4, 16]` int32: four features' bytes of 16 outputs
    stored: Expr  # `[slots, parts, 16, 16]` int32: a unit's sums
    totals: Expr  # `[panels, 16, 16]`

    def emit(self, count: Expr) -> None:
        """Multiplies and stores them."""
        with T.serial(self.rows.codes.shape[0]) as group:
            amx.configure(self.rows.depth)
            self._multiply_panels(group)
            amx.release()
            first = T.Bind(group * i64(amx.TILE_ROWS))
            rows = first, T.min(i64(amx.TILE_ROWS), count - first)
            store_totals(self.product, rows, (self.first_slot, self.num_panels), self.totals)

    def _multiply_panels(self, group: Expr) -> None:
        """Leaves the panels' totals in their places.

        Where a panel's units are whole turns, the next panel's first ones are under way beside its
        last. Behind the last panel its own beginning is, and is dropped. Codes of eight bits, which
        memory bounds, gain nothing by that.
        """
        units = self.rows.units
        totals = registers(amx.TILE_ROWS)
        joined = units % _TURNS == 0 and units > _TURNS and self.product.weights.fmt.bits < 8
        begin, end = (_SUM, units + _UNPACK) if joined else (_UNPACK, units + _SUM)
        whole = max(0, (units + _UNPACK) // _TURNS - 1)
        if joined:
            first = self._panels(i64(0))
            for time in range(_UNPACK, _SUM):
                interleave(self._stages(totals, group, first, time))
        with T.serial(self.num_panels) as p:
            panels = self._panels(p)
            for row in range(amx.TILE_ROWS):
                put(totals, row, splat(0.0))
            for time in range(begin, _TURNS):
                interleave(self._stages(totals, group, panels, time))
            if whole:
                with T.serial(i64(whole)) as number:
                    for time in range(_TURNS):
                        step = number + i64(1)
                        interleave(self._stages(totals, group, panels, time, step))
            for time in range(_TURNS * (whole + 1), end):
                interleave(self._stages(totals, group, panels, time))
            if joined:
                following = self._panels(T.min(p + i64(1), self.num_panels - i64(1)))
                for time in range(_UNPACK, _SUM):
                    last = self._stages(totals, group, panels, units + time)
                    interleave(last + self._stages(totals, group, following, time))
            self._leave(totals, panels[0], p)

    def _panels(self, number: Expr) -> tuple[Expr, Expr]:
        """A panel of the task, and the one that is asked for behind it."""
        slot = self.first_slot + number
        panel, following = (slot_panel(self.product, slot + i64(later)) for later in range(2))
        return T.Bind(panel), T.Bind(following)

    def _stages(
        self,
        totals: Expr,
        group: Expr,
        panels: tuple[Expr, Expr],
        time: int,
        first: Expr | None = None,
    ) -> list[Iterator[None]]:
        """What is done of a panel's units at a time: all stages, counted from step `first`, or
        those that have work, counted from the beginning.
        """
        panel, following = panels
        stages: list[tuple[int, Callable[[Expr, int], Iterator[None]]]] = [
            (_UNPACK, lambda step, turn: self._unpack(panel, following, step, turn)),
            (0, lambda step, turn: self._multiply(group, step, turn)),
            (
                _STORE if self.rows.parts == 1 else _STORE_PARTS,
                lambda step, turn: self._store(turn),
            ),
            (_SUM, lambda step, turn: self._sum(totals, group, panel, step, turn)),
        ]
        now = []
        for lag, stage in stages:
            step, turn = divmod(time - lag, _TURNS)
            if first is not None:
                now.append(stage(first + i64(step), turn))
            elif 0 <= time - lag < self.rows.units:
                now.append(stage(i64(step), turn))
        return now

    def _leave(self, totals: Expr, panel: Expr, p: Expr) -> None:
        """Puts a panel's totals in place `p`."""
        weights = self.product.weights
        scale = None if weights.fmt.group else T.Bind(weights.scale(i64(0), panel, i64(0)))
        for row in range(amx.TILE_ROWS):
            total = get(totals, row)
            total = total if scale is None else total * scale
            T.buffer_store(self.totals, total, [p, i64(row), lanes(i64(0))])

    def _unpack(self, panel: Expr, following: Expr, step: Expr, turn: int) -> Iterator[None]:
        """A unit's codes as signed bytes, and asks for one that is unpacked later."""
        weights, unit = self.product.weights, self.streams.unit(step, turn)
        over, next_unit = self.streams.next(step, turn)
        next_panel = T.Bind(T.Select(over, following, panel))
        addresses = unit_addresses(weights, next_panel, next_unit, self.rows.unit)
        words = self.rows.unit // 4
        for quarter in range(4):
            for address in addresses[quarter::4]:
                prefetch(address)
            for number in range(quarter * words // 4, (quarter + 1) * words // 4):
                found = _signed_bytes(weights, panel, unit, words, number)
                at = [i64(turn % _SLOTS), i64(number), lanes(i64(0))]
                T.buffer_store(self.unpacked, found, at)
            yield

    def _multiply(self, group: Expr, step: Expr, turn: int) -> Iterator[None]:
        """Starts a unit's sums."""
        rows = self.rows
        unit, steps = self.streams.unit(step, turn), rows.unit // rows.depth
        for number in range(steps):
            part, first = divmod(number, steps // rows.parts)
            if not first:
                amx.clear(self._tile(turn, part))
            x, w = amx.activation_tile((turn + number) % 2), amx.weight_tile((turn + number) % 2)
            codes = first_bytes(rows.codes, group, unit * i64(steps) + i64(number))
            amx.load(x, codes, rows.depth)
            yield
            found = self.unpacked[i64(turn % _SLOTS), i64(number * rows.depth // 4), i64(0)]
            amx.load(w, T.address_of(found), amx.TILE_BYTES)
            amx.multiply("tdpbssd", self._tile(turn, part), x, w)
            yield

    def _store(self, turn: int) -> Iterator[None]:
        """Ends them."""
        for part in range(self.rows.parts):
            store_sums(self._tile(turn, part), self.stored, i64(turn % _SLOTS), i64(part))
            yield

    def _tile(self, turn: int, part: int) -> int:
        return (turn * self.rows.parts + part) % _TURNS

    def _sum(self, totals: Expr, group: Expr, panel: Expr, step: Expr, turn: int) -> Iterator[None]:
        """Adds a unit's Σ_parts (scale · Σ (code - offset)·x + minimum · Σ x)."""
        weights, rows = self.product.weights, self.rows
        fmt = weights.fmt
        unit = self.streams.unit(step, turn)
        parts = [T.Bind(unit * i64(rows.parts) + i64(part)) for part in range(rows.parts)]
        scales, minimums = [], []
        if fmt.group:
            scales = [T.Bind(weights.scale(i64(0), panel, part)) for part in parts]
            back = T.Bind(scales[0] * splat(-WHOLE))
        if fmt.has_min:
            offset = splat(float(_offset(fmt)))
            for part, scale in zip(parts, scales, strict=True):
                minimum = weights.minimum(i64(0), panel, part)
                minimums.append(T.Bind(minimum + scale * offset))
        for row in range(amx.TILE_ROWS):
            sums = [
                self.stored[i64(turn % _SLOTS), i64(part), i64(row), lanes(i64(0))]
                for part in range(rows.parts)
            ]
            if scales:
                value = _fma(_above_whole(sums[0]), scales[0], back)
                for found, scale in zip(sums[1:], scales[1:], strict=True):
                    value = _fma(T.Cast(F32X16, found), scale, value)
            else:
                value = T.Cast(F32X16, sums[0])
            factor = rows.scales[group, unit, i64(row)]
            total = avx512.add_product(get(totals, row), value, factor)
            if rows.sums is not None:
                for part, minimum in zip(parts, minimums, strict=True):
                    total = total + minimum * T.broadcast(rows.sums[group, part, i64(row)], PANEL)
            put(totals, row, total)
            if row % 4 == 3:
                yield


def _signed_bytes(weights: WeightPanels, panel: Expr, unit: Expr, words: int, number: int) -> Expr:
    """Word `number` of a unit's: four features' codes of each of 16 rows less the offset, int32x16,
    times 2^shift.
    """
    fmt = weights.fmt
    signs = in_each_byte(0x80)
    if fmt.codebook is not None:
        word = weights.word(i64(0), panel, unit * i64(words) + i64(number))
        return T.bitwise_xor(word, signs)
    word = code_bytes(weights, panel, unit, words, number, _shift(fmt))
    return T.bitwise_xor(word, signs)


def _above_whole(value: Expr) -> Expr:
    """WHOLE + an int32x16 of less than 2^22, float32x16, by whole-number arithmetic alone.

    Beside tiles a processor has one unit for float arithmetic, and two for this. What is too much
    goes with the multiplication by a group's scale, exactly: 1.5 times one has few enough bits.
    """
    return T.reinterpret(F32X16, value + T.broadcast(T.int32(WHOLE_BITS), PANEL))


def _fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """a · b + c, rounded once."""
    return T.call_llvm_pure_intrin(F32X16, "llvm.fma.v16f32", a, b, c)
