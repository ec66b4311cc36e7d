"""Products of quantized activations in matrix registers, as bytes.

A tile product of bytes takes as long as one of bfloat16 and is twice as deep. It sums up whole
numbers, so all features of a chunk share a scale: weights (byte_panels.py) and activations
(byte_rows.py) are brought to it from their groups' own scales and rounded to bytes again. What that
would cost most of its bits, features with outlying activations, is multiplied in bfloat16 besides.

While a block of rows is multiplied, what the block before it summed up is scaled and added or
stored, and, where chunks are long, the weights that the next stage multiplies are unpacked: beside
tile instructions much of that takes no time of its own.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import i64, on_stack
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.byte_panels import PIECE, BytePanels
from llmc.targets.cpu.kernels.byte_rows import EXACT, STEP, ByteRows
from llmc.targets.cpu.kernels.integer import CodedRows
from llmc.targets.cpu.kernels.panels import F32X16, lanes, prefetch, scratch, splat
from llmc.targets.cpu.kernels.register_tiles import fetch_residual
from llmc.targets.cpu.kernels.tile_tasks import (
    Chunks,
    TileTask,
    first_bytes,
    for_each_task,
    multiply_step,
    place_of,
    store_sums,
)
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.kernels.vector import named
from llmc.targets.cpu.layout import PANEL
from llmc.targets.cpu.parameters import TileParameters

Expr = Any
_BLOCK = amx.PANELS  # groups of rows that are multiplied together
_FRACTION = 16  # bits
# Places of what describes a stage's weights; panels and those read afterwards stand at the end.
_TURN, _CHUNK, _FIRST, _CODES, _PIECES, _PANELS = range(6)


def takes(fmt: WeightFormat, k: int) -> bool:
    """Whether products with rows of k features in the format can be made here."""
    return not fmt.is_float and k % STEP == 0


def byte_tiles(product: Product, x: CodedRows, count: Expr, params: TileParameters) -> None:
    """y = x · Wᵀ for `count` rows of activations, where `takes` says so."""
    weights = product.weights
    chunks = Chunks.of(weights.k // STEP, params.steps, max(1, weights.fmt.group // STEP))
    rows = ByteRows.prepare(x, count, chunks)
    ahead = chunks.size >= params.ahead
    for_each_task(product, count, params, lambda task: _Task.of(task, chunks, rows, ahead).emit())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A task and what it works in. Of two blocks of rows in turn, one is multiplied while the other
    is settled; of two stages' weights, one is multiplied while the other is unpacked.
    """

    task: TileTask
    chunks: Chunks
    rows: ByteRows
    panels: BytePanels
    ahead: bool  # whether the next stage's weights are unpacked meanwhile
    codes: Expr  # `[stages, 2, steps, 16, 16]` int32: a chunk of two panels as bytes
    exact: Expr  # `[stages, 2, tiles, 16, 16]` int32: and features of it in bfloat16
    scales: Expr  # `[stages, 2, 16]`: what the bytes stand for
    inverses: Expr  # likewise: one over it
    sums: Expr  # `[2, panels, groups, 16, 16]` int32: a block's sums of bytes
    exact_sums: Expr  # likewise, float32
    totals: Expr | None  # `[groups, slots, 16, 16]`, where there are chunks or gates to wait for

    @classmethod
    def of(cls, task: TileTask, chunks: Chunks, rows: ByteRows, ahead: bool) -> _Task:
        """Takes the scratch."""
        tile = (amx.TILE_ROWS, PANEL)
        block = (2, amx.PANELS, _BLOCK, *tile)
        stages = 2 if ahead else 1
        waits = chunks.count > 1 or task.product.gated is not None
        return cls(
            task=task,
            chunks=chunks,
            rows=rows,
            panels=BytePanels(task.product.weights),
            ahead=ahead,
            codes=scratch((stages, amx.PANELS, chunks.size, *tile), "int32"),
            exact=scratch((stages, amx.PANELS, ByteRows.exact_tiles(chunks), *tile), "int32"),
            scales=scratch((stages, amx.PANELS, PANEL)),
            inverses=scratch((stages, amx.PANELS, PANEL)),
            sums=scratch(block, "int32"),
            exact_sums=scratch(block),
            totals=scratch((task.size, task.width, *tile)) if waits else None,
        )

    @property
    def exact_pairs(self) -> int:
        """Pairs of exact features of a panel's chunk."""
        return int(self.exact.shape[2]) * EXACT // 2

    def emit(self) -> None:
        """Multiplies and stores."""
        amx.configure(STEP)
        if self.ahead:
            _Weights.of(self, i64(0), i64(0), i64(0)).unpack_all()
        self.task.for_each_stage(self.chunks.count, self._stage)
        if self.task.product.gated is not None:
            self.task.store_gated(self.totals)
        amx.release()

    def _stage(self, number: Expr, slot: Expr) -> None:
        """All rows times a chunk of the two panels from `slot` on."""
        task, turn, following = self.task, i64(0), None
        if self.ahead:
            turn = named(T.floormod(task.stage_number(number, slot), i64(2)))
            following = _Weights.of(self, *task.next_stage(number, slot), i64(1) - turn)
        else:
            _Weights.of(self, number, slot, turn).unpack_all()

        def column(width: int) -> None:
            stage = _Stage(self, number, slot, width, turn, following)
            task.for_each_block(stage.multiply)
            last = named(T.floordiv(task.num_groups - i64(1), i64(_BLOCK)) * i64(_BLOCK))
            rest = task.num_rows - task.first_row(last)
            stage.settle(last, T.min(rest, i64(_BLOCK * amx.TILE_ROWS)))

        task.with_width(task.stage_panels(slot), column)


@dataclass(frozen=True, slots=True)
class _Weights:
    """A chunk of two panels, which is made ready in pieces.

    What describes it is in memory: TVM's analyses would put what it is made of in every place.
    """

    task: _Task
    numbers: Expr  # int64

    @classmethod
    def of(cls, of: _Task, number: Expr, slot: Expr, turn: Expr) -> _Weights:
        """Leaves a chunk's scales in their place; one past the last has no pieces."""
        task, chunks = of.task, of.chunks
        exists = T.Bind(number < i64(chunks.count))
        number = T.Bind(T.min(number, i64(chunks.count - 1)))
        start = chunks.start(number)
        steps = chunks.length(start)
        codes = steps * i64(STEP // PIECE)
        pieces = T.Select(exists, (codes + i64(of.exact_pairs)) * i64(amx.PANELS), i64(0))
        last = task.stage_panels(slot) - i64(1)
        # Where there is no second panel, the first is taken again.
        panels = [task.panel(slot + T.min(i64(p), last)) for p in range(amx.PANELS)]
        following = [task.panel(slot + i64(amx.PANELS + p)) for p in range(amx.PANELS)]
        held = [turn, number, start * i64(STEP // PIECE), codes, pieces, *panels, *following]
        numbers = on_stack((len(held),), "int64")
        for at, value in enumerate(held):
            T.buffer_store(numbers, value, [i64(at)])
        weights = cls(of, numbers)
        with T.If(exists), T.Then(), T.serial(i64(amx.PANELS)) as p:
            place = [weights._turn, p, lanes(i64(0))]
            T.buffer_store(of.scales, of.panels.scale(weights._panel(p), start, steps), place)
            T.buffer_store(of.inverses, splat(1.0) / of.scales[*place], place)
        return weights

    def _number(self, place: int) -> Expr:
        return self.numbers[i64(place)]

    @property
    def _turn(self) -> Expr:
        # A constant where there is one place: TVM cuts a buffer down to the index that is read.
        return self._number(_TURN) if self.task.ahead else i64(0)

    @property
    def pieces(self) -> Expr:
        """Of both panels: of bytes, and behind them pairs of exact features."""
        return self._number(_PIECES)

    def _panel(self, p: Expr) -> Expr:
        return self.numbers[i64(_PANELS) + p]

    def unpack_all(self) -> None:
        """Makes all pieces ready."""
        for p in range(amx.PANELS):
            with T.serial(self._codes) as piece:
                self._unpack_codes(i64(p), piece)
            with T.serial(i64(self.task.exact_pairs)) as pair:
                self._unpack_exact(i64(p), pair)

    def unpack(self, number: Expr) -> None:
        """Makes a piece ready."""
        exact = T.Bind(number - self._codes * i64(amx.PANELS))
        with T.If(exact < i64(0)):
            with T.Then():
                p = T.Bind(T.Cast("int64", number >= self._codes))
                self._unpack_codes(p, T.Bind(number - p * self._codes))
            with T.Else():
                p = T.Bind(T.floormod(exact, i64(amx.PANELS)))
                self._unpack_exact(p, T.Bind(T.floordiv(exact, i64(amx.PANELS))))

    @property
    def _codes(self) -> Expr:
        """Pieces of bytes of a panel."""
        return self._number(_CODES)

    def _unpack_codes(self, p: Expr, piece: Expr) -> None:
        of = self.task
        of.panels.unpack(
            self._panel(p),
            self._number(_FIRST) + piece,
            T.Bind(of.inverses[self._turn, p, lanes(i64(0))]),
            of.codes,
            [self._turn, p, T.floordiv(piece, i64(STEP // PIECE))],
            self._panel(p + i64(amx.PANELS)),
        )

    def _unpack_exact(self, p: Expr, pair: Expr) -> None:
        of, chunk = self.task, self._number(_CHUNK)
        features = [of.rows.features[chunk, pair * i64(2) + i64(i)] for i in range(2)]
        place = [T.floordiv(pair, i64(EXACT // 2)), T.floormod(pair, i64(EXACT // 2))]
        found = of.panels.exact_pair(self._panel(p), features)
        T.buffer_store(of.exact, found, [self._turn, p, *place, lanes(i64(0))])


@dataclass(frozen=True, slots=True)
class _Stage:
    """A chunk of two panels, or one, and all rows of a task, in blocks of two groups, or one."""

    of: _Task
    number: Expr  # of the chunk
    slot: Expr
    width: int
    turn: Expr
    following: _Weights | None  # what is unpacked meanwhile

    def multiply(self, group: Expr, groups: int) -> None:
        """Leaves the sums of a block from `group` on; meanwhile settles the block before it, and
        unpacks its share of what follows.
        """
        of, rows = self.of, self.of.rows
        numbers = [T.Bind(of.task.first_group + group + i64(g)) for g in range(groups)]
        tiles = [(g, p) for g in range(groups) for p in range(self.width)]

        def sum_up(into: Expr, products: Callable[[], None]) -> None:
            for g, p in tiles:
                amx.clear(amx.sum_tile(g, p))
            products()
            for g, p in tiles:
                store_sums(amx.sum_tile(g, p), into, _turn_of(group), i64(p), i64(g))

        def exact() -> None:
            for tile in range(int(of.exact.shape[2])):
                activations = [first_bytes(rows.exact, n, self.number, i64(tile)) for n in numbers]
                weights = [
                    first_bytes(of.exact, self.turn, i64(p), i64(tile)) for p in range(self.width)
                ]
                multiply_step("tdpbf16ps", activations, weights)

        def codes() -> None:
            start = of.chunks.start(self.number)
            steps = of.chunks.length(start)
            before = named(T.max(group - i64(_BLOCK), i64(0)))
            settled = T.min(group, i64(_BLOCK)) * i64(amx.TILE_ROWS)
            works: list[_Work] = []
            if self.following is not None:
                works.append(self._unpacking(self.following, group, steps))
            works.append((_Spread.of(settled, steps), lambda row: self._settle(before, row)))
            with T.serial(steps) as step:
                self._fetch(group, step)
                activations = [first_bytes(rows.codes, n, start + step) for n in numbers]
                weights = [
                    first_bytes(of.codes, self.turn, i64(p), step) for p in range(self.width)
                ]
                multiply_step("tdpbssd", activations, weights)
                for spread, work in works:
                    spread.go_on(step, work)

        sum_up(of.exact_sums, exact)
        sum_up(of.sums, codes)

    def _unpacking(self, weights: _Weights, group: Expr, steps: Expr) -> _Work:
        """A block's share of it."""
        groups = self.of.task.num_groups
        blocks = T.max(T.floordiv(groups + i64(_BLOCK - 1), i64(_BLOCK)), i64(1))
        block = T.floordiv(group, i64(_BLOCK))
        begin, end = (
            named(T.floordiv(weights.pieces * at, blocks)) for at in (block, block + i64(1))
        )
        return _Spread.of(end - begin, steps), lambda at: weights.unpack(T.Bind(begin + at))

    def settle(self, group: Expr, count: Expr) -> None:
        """Settles `count` rows of a block."""
        with T.serial(count) as row:
            self._settle(group, row)

    def _fetch(self, group: Expr, step: Expr) -> None:
        """Asks for a row of what a block's sums will be added to, far from the one before it."""
        of, task = self.of, self.of.task
        if of.chunks.count > 1:
            assert of.totals is not None
            g, place = place_of(T.floormod(step, i64(_BLOCK * amx.TILE_ROWS)))
            for p in range(self.width):
                at = (group + g, self.slot + i64(p), place, i64(0))
                prefetch(T.address_of(of.totals[*at]))
            return
        row = T.min(task.first_row(group) + step, task.num_rows - i64(1))
        panels = [task.first_slot + self.slot + i64(p) for p in range(self.width)]
        fetch_residual(task.product.residual, panels, [row])

    def _settle(self, group: Expr, row: Expr) -> None:
        """Adds a row's sums to its totals, or stores what they complete; rows are counted from the
        block's first, which is that of `group`.
        """
        of, task = self.of, self.of.task
        g, place = place_of(row)
        scale = of.rows.scales[self.number, task.first_group + group + g, place]
        scale = T.Bind(T.broadcast(scale, PANEL))
        values, places = [], []
        for p in range(self.width):
            places.append((group + g, self.slot + i64(p), place, lanes(i64(0))))
            at = (_turn_of(group), i64(p), g, place, lanes(i64(0)))
            unit = of.scales[self.turn, i64(p), lanes(i64(0))]
            scaled = T.Cast(F32X16, of.sums[*at]) * (scale * unit)
            values.append(T.Bind(scaled + of.exact_sums[*at]))

        def keep(values: list[Expr]) -> None:
            for value, at in zip(values, places, strict=True):
                T.buffer_store(of.totals, value, list(at))

        def finish(values: list[Expr]) -> None:
            task.store_row(self.slot, task.first_row(group) + row, values)

        def added() -> list[Expr]:
            assert of.totals is not None
            return [T.Bind(v + of.totals[*at]) for v, at in zip(values, places, strict=True)]

        end = finish if task.product.gated is None else keep
        if of.chunks.count == 1:
            end(values)
            return
        with T.If(self.number == i64(0)):
            with T.Then():
                keep(values)
            with T.Else(), T.If(self.number == i64(of.chunks.count - 1)):
                with T.Then():
                    end(added())
                with T.Else():
                    keep(added())


@dataclass(frozen=True, slots=True)
class _Spread:
    """Work that is done in equal parts between a loop's steps."""

    count: Expr
    rate: Expr  # of a step, times 2^_FRACTION

    @classmethod
    def of(cls, count: Expr, steps: Expr) -> _Spread:
        """`count` pieces of it in so many steps."""
        steps = T.max(steps, i64(1))
        rate = T.floordiv(count * i64(1 << _FRACTION) + steps - i64(1), steps)
        return cls(named(count), named(rate))

    def go_on(self, step: Expr, piece: Callable[[Expr], None]) -> None:
        """`piece(number)` for those of a step."""
        begin, end = (
            T.Bind(T.min(T.shift_right(at * self.rate, i64(_FRACTION)), self.count))
            for at in (step, step + i64(1))
        )
        with T.serial(end - begin) as number:
            piece(T.Bind(begin + number))


_Work = tuple[_Spread, Callable[[Expr], None]]


def _turn_of(group: Expr) -> Expr:
    """Which of two places is the block's that begins with a group."""
    return T.Bind(T.floormod(T.floordiv(group, i64(_BLOCK)), i64(2)))
