"""Quantized activations as bytes of one scale a chunk of features, for matrix registers.

Activations of language models do not bear a common scale: a few features are tens of times as large
as the rest and would leave it no bits. So the features of a chunk with the largest activations are
taken out and kept in bfloat16.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64, on_stack
from llmc.targets.cpu.kernels import amx, vector
from llmc.targets.cpu.kernels.avx512 import HALVES, INT16, UINT16, gather, scale_halves, upper_bytes
from llmc.targets.cpu.kernels.bfloat16 import from_float32
from llmc.targets.cpu.kernels.integer import CodedRows
from llmc.targets.cpu.kernels.math import lane_max
from llmc.targets.cpu.kernels.outputs import fold
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    get,
    lanes,
    put,
    registers,
    scratch,
    splat,
)
from llmc.targets.cpu.kernels.tile_tasks import Chunks, place_of, row_groups
from llmc.targets.cpu.layout import PANEL, ceildiv

Expr = Any
STEP = amx.TILE_BYTES
"""Features of a tile of bytes."""
EXACT = amx.TILE_BYTES // 2
"""Features of a tile of bfloat16."""
_STEPS_OF_EXACT = 16  # for as many steps of bytes there is a tile of bfloat16
_SCORED_ROWS = 64  # that are looked at to find the largest features
_BISECTIONS = 14
_LIMIT = 127.0
_FRACTION = 32767  # of 2^15


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRows:
    """Activations in tiles, a scale for each row and chunk; missing rows repeat the last one."""

    codes: Expr  # `[groups, steps, 16, 64]` int8, zero where `exact` has the feature
    scales: Expr  # `[chunks, groups, 16]` float32
    exact: Expr  # `[groups, chunks, tiles, 16, 32]` uint16: bfloat16
    features: Expr  # `[chunks, tiles * 32]` int32: those in `exact`; -1: none

    @staticmethod
    def exact_tiles(chunks: Chunks) -> int:
        """Tiles of features that a chunk keeps in bfloat16."""
        return ceildiv(chunks.size, _STEPS_OF_EXACT)

    @classmethod
    def prepare(cls, x: CodedRows, count: Expr, chunks: Chunks) -> ByteRows:
        """Chooses the features and fills the tiles."""
        groups = row_groups(count)
        tiles = cls.exact_tiles(chunks)
        rows = cls(
            codes=scratch((groups, chunks.steps, amx.TILE_ROWS, STEP), "int8"),
            scales=scratch((chunks.count, groups, amx.TILE_ROWS)),
            exact=scratch((groups, chunks.count, tiles, amx.TILE_ROWS, EXACT), "uint16"),
            features=scratch((chunks.count, tiles * EXACT), "int32"),
        )
        # No bits of a feature in `exact`, all bits of others.
        kept = scratch((chunks.steps * STEP,), "int8")
        loop = T.serial if chunks.count == 1 else T.parallel
        with loop(i64(chunks.count)) as number:
            _choose(x, count, chunks, number, kept, rows.features)
        with T.parallel(groups * i64(amx.TILE_ROWS)) as row:
            source = T.Bind(T.min(row, count - i64(1)))
            with T.serial(i64(chunks.count)) as number:
                rows._fill_codes(x, row, source, chunks, number, kept)
                rows._fill_exact(x, row, source, number)
        return rows

    def _fill_codes(
        self, x: CodedRows, row: Expr, source: Expr, chunks: Chunks, number: Expr, kept: Expr
    ) -> None:
        """A chunk of one row, in 16-bit numbers with 8 bits behind the point."""
        group, place = place_of(row)
        start = chunks.start(number)
        steps = chunks.length(start)
        first = T.Bind(T.floordiv(start * i64(STEP), i64(x.block)))
        last = T.floordiv((start + steps) * i64(STEP) + i64(x.block - 1), i64(x.block))
        blocks = T.Bind(last - first)
        scale = T.Bind(_highest(x.scales, source, first, blocks))
        shares = on_stack((ceildiv(chunks.size * STEP, x.block) + 1,), "int16")
        _in_units(x.scales, source, first, blocks, T.Bind(T.float32(_FRACTION) / scale), shares)
        values = on_stack((chunks.size * STEP,), "int16")  # of a step, even ones come first
        width = gcd(x.block, STEP)

        zero = T.broadcast(T.int16(0), HALVES)
        everything = T.ramp(i64(0), i64(1), HALVES)
        largest = on_stack((HALVES,), "int16")
        T.buffer_store(largest, zero, [everything])
        with T.serial(steps) as step:
            # Even features, and odd ones, in units of the chunk's highest scale.
            feature = T.Bind((start + step) * i64(STEP))
            all_of_step = T.ramp(feature, i64(1), STEP)
            codes = T.bitwise_and(x.codes[i64(0), source, all_of_step], kept[all_of_step])
            halves = T.Bind(T.reinterpret(UINT16, codes))
            parts = []
            for part in range(0, STEP, width):
                share = shares[T.floordiv(feature + i64(part), i64(x.block)) - first]
                parts.append(T.broadcast(share, width // 2))
            share = parts[0] if len(parts) == 1 else tirx.Shuffle(parts, list(range(HALVES)))
            share = T.Bind(share)
            even = T.shift_left(halves, T.broadcast(T.uint16(8), HALVES))
            odd = T.bitwise_and(halves, T.broadcast(T.uint16(0xFF00), HALVES))
            for i, half in enumerate((even, odd)):
                value = T.Bind(scale_halves(T.reinterpret(INT16, half), share))
                T.buffer_store(values, value, [_half_of(step, i)])
                magnitude = T.max(value, zero - value)
                T.buffer_store(largest, T.max(largest[everything], magnitude), [everything])
        reduce = f"llvm.vector.reduce.smax.v{HALVES}i16"
        peak = T.call_llvm_pure_intrin("int16", reduce, largest[everything])
        peak = T.Cast("float32", T.max(peak, T.int16(1)))
        # The largest becomes 127: by a power of two, and a factor from 1/2 to 1, and twice that.
        growth = T.Bind(T.float32(_LIMIT * 256) / peak)
        power = T.Bind(T.shift_right(T.reinterpret("int32", growth), T.int32(23)) - T.int32(127))
        inverse = T.shift_left(T.int32(126) - power, T.int32(23))
        inverse = T.Bind(T.reinterpret("float32", inverse))
        factor = T.Bind(T.Cast("int16", growth * inverse * T.float32(_FRACTION)))
        found = scale * inverse * T.float32(2.0**30 / _FRACTION) / T.Cast("float32", factor)
        T.buffer_store(self.scales, found, [number, group, place])
        shift = T.broadcast(T.Cast("int16", power), HALVES)
        half = T.broadcast(T.int16(128), HALVES)
        with T.serial(steps) as step:
            parts = []
            for i in range(2):
                value = T.shift_left(values[_half_of(step, i)], shift)
                part = T.Bind(scale_halves(value, T.broadcast(factor, HALVES)))
                parts.append(part + part + half)
            T.buffer_store(
                self.codes,
                T.reinterpret("int8x64", upper_bytes(*parts)),
                [group, start + step, place, T.ramp(i64(0), i64(1), STEP)],
            )

    def _fill_exact(self, x: CodedRows, row: Expr, source: Expr, number: Expr) -> None:
        """What a chunk of a row keeps in bfloat16."""
        group, place = place_of(row)

        def each(value: int) -> Expr:
            return T.broadcast(T.int32(value), PANEL)

        for i in range(0, int(self.features.shape[1]), PANEL):
            feature = T.Bind(T.max(self.features[number, lanes(i64(i))], each(0)))
            words = T.Bind(T.shift_right(feature, each(2)))
            four = gather("int32x16", "dpi", x.codes[i64(0), source, i64(0)], words)
            behind = each(24) - T.bitwise_and(T.shift_left(feature, each(3)), each(24))
            code = T.shift_right(T.shift_left(four, behind), each(24))
            block = T.Bind(T.floordiv(feature, each(x.block)))
            scale = gather(F32X16, "dps", x.scales[i64(0), source, i64(0)], block)
            value = from_float32(T.Bind(T.Cast(F32X16, code) * scale))
            at = [group, number, i64(i // EXACT), place, lanes(i64(i % EXACT))]
            T.buffer_store(self.exact, value, at)


def _half_of(step: Expr, half: int) -> Expr:
    return T.ramp(step * i64(STEP) + i64(half * HALVES), i64(1), HALVES)


def _highest(scales: Expr, row: Expr, first: Expr, count: Expr) -> Expr:
    """Of a row's scales of `count` blocks from `first` on."""
    highest = registers(1)
    put(highest, 0, splat(1e-30))

    def compare(at: Expr, size: int) -> None:
        found = scales[i64(0), row, vector.at(first + at, size)]
        found = found if size == PANEL else T.broadcast(found, PANEL)
        put(highest, 0, T.max(get(highest, 0), found))

    _in_vectors(count, compare)
    return lane_max(get(highest, 0))


def _in_units(scales: Expr, row: Expr, first: Expr, count: Expr, unit: Expr, into: Expr) -> None:
    """A row's scales of `count` blocks from `first` on times `unit`, as int16 `[count]`."""

    def scale(at: Expr, size: int) -> None:
        found = scales[i64(0), row, vector.at(first + at, size)] * vector.spread(unit, size)
        T.buffer_store(into, vector.convert(found, "int16"), [vector.at(at, size)])

    _in_vectors(count, scale)


def _in_vectors(count: Expr, body: Callable[[Expr, int], None]) -> None:
    """`body(first, size)` for `count` numbers: sixteen at a time, what is left one by one."""
    vectors = T.Bind(T.floordiv(count, i64(PANEL)))
    with T.serial(vectors) as number:
        body(T.Bind(number * i64(PANEL)), PANEL)
    done = T.Bind(vectors * i64(PANEL))
    with T.serial(count - done) as rest:
        body(T.Bind(done + rest), 1)


def _choose(
    x: CodedRows, count: Expr, chunks: Chunks, number: Expr, kept: Expr, features: Expr
) -> None:
    """The features of a chunk whose activations are largest, in any of the rows looked at."""
    most = int(features.shape[1])
    start = chunks.start(number)
    steps = chunks.length(start)
    first = T.Bind(start * i64(STEP))
    vectors = T.Bind(steps * i64(STEP // PANEL))
    scores = scratch((chunks.size * STEP,))
    largest = registers(1)
    put(largest, 0, splat(0.0))
    stride = T.Bind(T.floordiv(count + i64(_SCORED_ROWS - 1), i64(_SCORED_ROWS)))
    with T.serial(vectors) as index:
        feature = T.Bind(first + index * i64(PANEL))
        score = registers(1)
        put(score, 0, splat(0.0))
        with T.serial(T.floordiv(count + stride - i64(1), stride)) as turn:
            row = T.Bind(turn * stride)
            scale = x.scale(row, T.floordiv(feature, i64(x.block)))
            value = T.Bind(x.values(row, feature) * scale)
            put(score, 0, T.max(get(score, 0), T.max(value, splat(0.0) - value)))
        T.buffer_store(scores, get(score, 0), [lanes(index * i64(PANEL))])
        put(largest, 0, T.max(get(largest, 0), get(score, 0)))

    limit = _limit(scores, vectors, lane_max(get(largest, 0)), most)
    for i in range(0, most, PANEL):
        T.buffer_store(features, T.broadcast(T.int32(-1), PANEL), [number, lanes(i64(i))])
    found = on_stack((1,), "int64")
    T.buffer_store(found, i64(0), [i64(0)])
    with T.serial(steps * i64(STEP)) as feature:
        is_large = T.Bind(scores[feature] >= limit)
        T.buffer_store(kept, T.Select(is_large, T.int8(0), T.int8(-1)), [first + feature])
        with T.If(is_large), T.Then():
            T.buffer_store(features, T.Cast("int32", first + feature), [number, found[i64(0)]])
            T.buffer_store(found, found[i64(0)] + i64(1), [i64(0)])


def _limit(scores: Expr, vectors: Expr, largest: Expr, most: int) -> Expr:
    """About the lowest limit that at most `most` scores reach."""
    limits = on_stack((2,), "float32")  # too many reach the first, not too many the second
    T.buffer_store(limits, T.float32(0), [i64(0)])
    T.buffer_store(limits, largest * T.float32(1.001) + T.float32(1e-30), [i64(1)])
    with T.serial(i64(_BISECTIONS)):
        middle = T.Bind((limits[i64(0)] + limits[i64(1)]) * T.float32(0.5))
        reached = on_stack((PANEL,), "int32")
        T.buffer_store(reached, T.broadcast(T.int32(0), PANEL), [lanes(i64(0))])
        with T.serial(vectors) as index:
            over = scores[lanes(index * i64(PANEL))] >= T.broadcast(middle, PANEL)
            ones = T.Select(over, T.broadcast(T.int32(1), PANEL), T.broadcast(T.int32(0), PANEL))
            T.buffer_store(reached, reached[lanes(i64(0))] + ones, [lanes(i64(0))])
        total = fold([reached[lanes(i64(0))]], lambda a, b: a + b)
        fits = T.Bind(total <= T.int32(most))
        for i, moves in enumerate((tirx.Not(fits), fits)):
            T.buffer_store(limits, T.Select(moves, middle, limits[i64(i)]), [i64(i)])
    return T.Bind(limits[i64(1)])
