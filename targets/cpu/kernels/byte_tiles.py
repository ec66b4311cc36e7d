"""Products of quantized activations in matrix registers, as bytes.

A tile product of bytes is as fast as one of bfloat16 and twice as deep. It sums up whole numbers, so
all features of a chunk share a scale: weights and activations are brought to it from their groups'
own scales, each rounded to a byte. Weights bear that well. Activations of language models do not:
a few features are tens of times as large as the rest and would leave it no bits. So the `OUTLIERS`
features of a chunk with the largest activations are taken out and multiplied in bfloat16, by one
tile product more.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.bfloat16 import from_float32
from llmc.targets.cpu.kernels.integer import CodedRows
from llmc.targets.cpu.kernels.math import lane_max
from llmc.targets.cpu.kernels.outputs import INTEGER_BITS, INTEGER_OFFSET, lane_sum
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    WeightPanels,
    get,
    i64,
    lanes,
    local,
    prefetch,
    put,
    registers,
    scratch,
    splat,
)
from llmc.targets.cpu.kernels.tile_tasks import (
    Chunks,
    TileTask,
    each_sum_tile,
    first_bytes,
    for_each_task,
    multiply_step,
    place_of,
    prefetch_row,
    row_groups,
)
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.kernels.unpacked_bfloat16 import rounded_pairs
from llmc.targets.cpu.layout import PANEL, stored_zero_point
from llmc.targets.cpu.parameters import TileParameters

Expr = Any
STEP = amx.TILE_BYTES
"""Features of a tile of bytes."""
OUTLIERS = amx.TILE_BYTES // 2
"""Features of a chunk that are multiplied in bfloat16: a tile's depth."""
_SCORED_ROWS = 64  # that are looked at to find them
_BISECTIONS = 14
_LIMIT = 127.0
_HALVES = 2 * PANEL  # 16-bit lanes
_INT16 = f"int16x{_HALVES}"
_FRACTION = 32767  # of 2^15


def takes(fmt: WeightFormat, k: int) -> bool:
    """Whether products with rows of k features in the format can be made here."""
    return not fmt.is_float and k % STEP == 0


def byte_tiles(product: Product, x: CodedRows, count: Expr, params: TileParameters) -> None:
    """y = x · Wᵀ for `count` rows of activations, where `takes` says so."""
    weights = product.weights
    align = max(1, weights.fmt.group // STEP)
    chunks = Chunks.of(weights.k // STEP, params.steps, align)
    rows = _Rows.prepare(x, weights.k, count, chunks)
    panel = _Panels(weights, chunks)
    for_each_task(product, count, params, lambda task: _emit(task, rows, panel))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Activations in tiles, a scale for each row and chunk; missing rows repeat the last one."""

    codes: Expr  # `[groups, steps, 16, 64]` int8, zero where `exact` has the feature
    scales: Expr  # `[chunks, groups, 16]` float32
    exact: Expr  # `[groups, chunks, 16, OUTLIERS]` uint16: bfloat16
    index: Expr  # `[chunks, OUTLIERS]` int32: the features in `exact`; -1: none

    @classmethod
    def prepare(cls, x: CodedRows, k: int, count: Expr, chunks: Chunks) -> _Rows:
        """Chooses the features and fills the tiles."""
        groups = row_groups(count)
        rows = cls(
            codes=scratch((groups, chunks.steps, amx.TILE_ROWS, STEP), "int8"),
            scales=scratch((chunks.count, groups, amx.TILE_ROWS)),
            exact=scratch((groups, chunks.count, amx.TILE_ROWS, OUTLIERS), "uint16"),
            index=scratch((chunks.count, OUTLIERS), "int32"),
        )
        kept = scratch((k,), "int8")  # no bits of a feature in `exact`, all bits of others
        loop = T.serial if chunks.count == 1 else T.parallel
        with loop(i64(chunks.count)) as number:
            _choose(x, count, chunks, number, kept, rows.index)
        with T.parallel(groups * i64(amx.TILE_ROWS)) as row:
            source = T.Bind(T.min(row, count - i64(1)))
            with T.serial(i64(chunks.count)) as number:
                rows._fill(x, row, source, chunks, number, kept)
        return rows

    def _fill(
        self, x: CodedRows, row: Expr, source: Expr, chunks: Chunks, number: Expr, kept: Expr
    ) -> None:
        """A chunk of one row, in 16-bit numbers of 8 bits behind the point."""
        group, place = place_of(row)
        start = chunks.start(number)
        steps = chunks.length(start)
        width = gcd(x.block, STEP)
        first = T.Bind(T.floordiv(start * i64(STEP), i64(x.block)))
        last = T.floordiv((start + steps) * i64(STEP) + i64(x.block - 1), i64(x.block))
        highest = registers(1)
        at = [i64(0), i64(0)]
        T.buffer_store(highest, T.float32(1e-30), at)
        with T.serial(last - first) as block:
            scale = x.scales[i64(0), source, first + block]
            T.buffer_store(highest, T.max(highest[*at], scale), at)
        scale = T.Bind(highest[*at])
        unit = T.Bind(T.float32(_FRACTION) / scale)

        def values(step: Expr) -> tuple[Expr, Expr]:
            """Features of a step in units of the chunk's highest scale: even ones, odd ones."""
            feature = T.Bind((start + step) * i64(STEP))
            codes = x.codes[i64(0), source, T.ramp(feature, i64(1), STEP)]
            codes = T.bitwise_and(codes, kept[T.ramp(feature, i64(1), STEP)])
            halves = T.Bind(T.reinterpret(f"uint16x{_HALVES}", codes))
            shares = []
            for part in range(0, STEP, width):
                share = x.scales[i64(0), source, T.floordiv(feature + i64(part), i64(x.block))]
                shares.append(T.Bind(T.Cast("int16", share * unit)))
            factor = T.broadcast(shares[0], _HALVES)
            if len(shares) > 1:
                parts = [T.broadcast(share, width // 2) for share in shares]
                factor = tirx.Shuffle(parts, list(range(_HALVES)))
            factor = T.Bind(factor)
            even = T.shift_left(halves, T.broadcast(T.uint16(8), _HALVES))
            odd = T.bitwise_and(halves, T.broadcast(T.uint16(0xFF00), _HALVES))
            found = [multiply_halves(T.reinterpret(_INT16, part), factor) for part in (even, odd)]
            return T.Bind(found[0]), T.Bind(found[1])

        zero = T.broadcast(T.int16(0), _HALVES)
        largest = local(_HALVES, "int16")
        everything = T.ramp(i64(0), i64(1), _HALVES)
        T.buffer_store(largest, zero, [everything])
        with T.serial(steps) as step:
            for value in values(step):
                magnitude = T.max(value, zero - value)
                T.buffer_store(largest, T.max(largest[everything], magnitude), [everything])
        reduce = f"llvm.vector.reduce.smax.v{_HALVES}i16"
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
        shift = T.broadcast(T.Cast("int16", power), _HALVES)
        half = T.broadcast(T.int16(128), _HALVES)
        with T.serial(steps) as step:
            parts = []
            for value in values(step):
                part = multiply_halves(T.shift_left(value, shift), T.broadcast(factor, _HALVES))
                part = T.Bind(part)
                parts.append(part + part + half)
            T.buffer_store(
                self.codes,
                T.reinterpret("int8x64", upper_bytes(*parts)),
                [group, start + step, place, T.ramp(i64(0), i64(1), STEP)],
            )
        for i in range(0, OUTLIERS, PANEL):
            features = T.Bind(self.index[number, lanes(i64(i))])
            features = T.Bind(T.max(features, T.broadcast(T.int32(0), PANEL)))
            words = T.shift_right(features, T.broadcast(T.int32(2), PANEL))
            four = gather("int32x16", "dpi", x.codes[i64(0), source, i64(0)], words)
            bits = T.shift_left(features, T.broadcast(T.int32(3), PANEL))
            rest = T.broadcast(T.int32(24), PANEL) - T.bitwise_and(
                bits, T.broadcast(T.int32(24), PANEL)
            )
            code = T.shift_right(T.shift_left(four, rest), T.broadcast(T.int32(24), PANEL))
            blocks = T.floordiv(features, T.broadcast(T.int32(x.block), PANEL))
            scale = gather(F32X16, "dps", x.scales[i64(0), source, i64(0)], T.Bind(blocks))
            value = T.Bind(T.Cast(F32X16, code) * scale)
            T.buffer_store(self.exact, from_float32(value), [group, number, place, lanes(i64(i))])


def gather(dtype: str, kind: str, first: Expr, places: Expr) -> Expr:
    """Sixteen numbers of 32 bits, at these places from the one whose value is `first`."""
    every = T.broadcast(tirx.const(True, "bool"), PANEL)
    nothing = T.broadcast(tirx.const(0, dtype.removesuffix("x16")), PANEL)
    name = f"llvm.x86.avx512.mask.gather.{kind}.512"
    address = T.address_of(first)
    return T.Bind(T.call_llvm_intrin(dtype, name, nothing, address, places, every, T.int32(4)))


def _choose(
    x: CodedRows, count: Expr, chunks: Chunks, number: Expr, kept: Expr, index: Expr
) -> None:
    """The features of a chunk whose activations are largest, in any of the rows looked at."""
    start = chunks.start(number)
    steps = chunks.length(start)
    first = T.Bind(start * i64(STEP))
    vectors = T.Bind(steps * i64(STEP // PANEL))
    scores = scratch((chunks.size * STEP,))
    largest = registers(1)
    put(largest, 0, splat(0.0))
    stride = T.Bind(T.floordiv(count + i64(_SCORED_ROWS - 1), i64(_SCORED_ROWS)))
    with T.serial(vectors) as vector:
        feature = T.Bind(first + vector * i64(PANEL))
        score = registers(1)
        put(score, 0, splat(0.0))
        with T.serial(T.floordiv(count + stride - i64(1), stride)) as number_of_row:
            row = T.Bind(number_of_row * stride)
            value = x.values(row, feature) * x.scale(row, T.floordiv(feature, i64(x.block)))
            value = T.Bind(value)
            put(score, 0, T.max(get(score, 0), T.max(value, splat(0.0) - value)))
        T.buffer_store(scores, get(score, 0), [lanes(vector * i64(PANEL))])
        put(largest, 0, T.max(get(largest, 0), get(score, 0)))

    # The lowest limit that at most OUTLIERS features reach, between the first two of these; the
    # third lies between them.
    limits = registers(1)

    def limit(i: int) -> Expr:
        return limits[i64(0), i64(i)]

    def set_limit(i: int, value: Expr) -> None:
        T.buffer_store(limits, value, [i64(0), i64(i)])

    set_limit(0, T.float32(0))
    set_limit(1, lane_max(get(largest, 0)) * T.float32(1.001) + T.float32(1e-30))
    with T.serial(i64(_BISECTIONS)):
        middle = T.Bind((limit(0) + limit(1)) * T.float32(0.5))
        reached = local(PANEL, "int32")
        T.buffer_store(reached, T.broadcast(T.int32(0), PANEL), [lanes(i64(0))])
        with T.serial(vectors) as vector:
            over = scores[lanes(vector * i64(PANEL))] >= T.broadcast(middle, PANEL)
            ones = T.Select(over, T.broadcast(T.int32(1), PANEL), T.broadcast(T.int32(0), PANEL))
            total = reached[lanes(i64(0))] + ones
            T.buffer_store(reached, total, [lanes(i64(0))])
        fits = T.Bind(lane_sum(reached[lanes(i64(0))]) <= T.int32(OUTLIERS))
        set_limit(0, T.Select(fits, limit(0), middle))
        set_limit(1, T.Select(fits, middle, limit(1)))
    for i in range(0, OUTLIERS, PANEL):
        T.buffer_store(index, T.broadcast(T.int32(-1), PANEL), [number, lanes(i64(i))])
    found = local(1, "int64")
    T.buffer_store(found, i64(0), [i64(0)])
    with T.serial(steps * i64(STEP)) as feature:
        is_outlier = T.Bind(scores[feature] >= limit(1))
        T.buffer_store(kept, T.Select(is_outlier, T.int8(0), T.int8(-1)), [first + feature])
        with T.If(is_outlier), T.Then():
            T.buffer_store(index, T.Cast("int32", first + feature), [number, found[i64(0)]])
            T.buffer_store(found, found[i64(0)] + i64(1), [i64(0)])


def multiply_halves(value: Expr, factor: Expr) -> Expr:
    """value · factor / 2^15, rounded, int16x32."""
    return T.call_llvm_pure_intrin(_INT16, "llvm.x86.avx512.pmul.hr.sw.512", value, factor)


def upper_bytes(even: Expr, odd: Expr) -> Expr:
    """The upper bytes of 16-bit numbers, int32x16: even ones become each half's lower byte."""
    even, odd = (T.reinterpret(f"uint16x{_HALVES}", part) for part in (even, odd))
    even = T.shift_right(even, T.broadcast(T.uint16(8), _HALVES))
    odd = T.bitwise_and(odd, T.broadcast(T.uint16(0xFF00), _HALVES))
    return T.reinterpret("int32x16", T.bitwise_or(even, odd))


@dataclass(frozen=True, slots=True)
class _Panels:
    """How a chunk of a panel becomes tiles."""

    weights: WeightPanels
    chunks: Chunks

    @property
    def bits(self) -> int:
        """Of a code, the lowest of its field of a word."""
        fmt = self.weights.fmt
        return 8 if fmt.codebook is not None else fmt.code_bits

    @property
    def is_whole(self) -> bool:
        """Whether codes are the bytes to multiply: a row has one scale."""
        fmt = self.weights.fmt
        return not fmt.group and not fmt.has_min and self.bits == 8

    @property
    def _middle(self) -> int:
        """What is taken off a stored code to make it signed."""
        return 1 << (self.bits - 1)

    def scale(self, panel: Expr, start: Expr, steps: Expr) -> Expr:
        """What the bytes of a chunk's rows stand for, float32x16."""
        weights = self.weights
        fmt = weights.fmt
        if self.is_whole:
            return weights.scale(i64(0), panel, i64(0))
        largest = registers(1)
        put(largest, 0, splat(1e-30))
        per_step = STEP / fmt.group if fmt.group else 0
        first: Expr = i64(0)
        count: Expr = i64(1)
        if per_step >= 1:
            first, count = start * i64(int(per_step)), steps * i64(int(per_step))
        elif per_step:
            align = fmt.group // STEP
            first, count = T.floordiv(start, i64(align)), T.floordiv(steps, i64(align))
        with T.serial(count) as number:
            scale, base = self._factors(panel, T.Bind(first + number))
            bound = T.Bind(T.max(scale, splat(0.0) - scale)) * splat(float(self._middle))
            if base is not None:
                # Codes reach from -middle to middle - 1.
                low = T.Bind(base - scale * splat(float(self._middle)))
                high = T.Bind(base + scale * splat(float(self._middle - 1)))
                for end in (low, high):
                    bound = T.max(bound, T.max(end, splat(0.0) - end))
            put(largest, 0, T.max(get(largest, 0), bound))
        return get(largest, 0) * splat(1 / _LIMIT)

    def _factors(self, panel: Expr, group: Expr) -> tuple[Expr, Expr | None]:
        """A group's scale and, where it is not zero, what a signed code of zero stands for."""
        weights = self.weights
        fmt = weights.fmt
        scale = T.Bind(weights.scale(i64(0), panel, group))
        shift = self._middle - stored_zero_point(fmt)
        base = None
        if fmt.has_min:
            base = weights.minimum(i64(0), panel, group) + scale * splat(float(shift))
        elif shift:
            base = scale * splat(float(shift))
        return scale, None if base is None else T.Bind(base)

    def unpack(
        self,
        panel: Expr,
        step: Expr,
        inverse: Expr,
        into: Expr,
        slot: Expr,
        place: Expr,
        following: Expr,
    ) -> None:
        """Features 64 · step … of a panel as bytes `[slots, places, 16, 16]` int32; `inverse` is
        one over what they stand for. Asks for as many of the panel `following`.
        """
        weights = self.weights
        fmt, width = weights.fmt, weights.width
        span = min(fmt.group or STEP, STEP)
        for part in range(STEP // span):
            factors: tuple[Expr, Expr] | None = None
            if not self.is_whole:
                group = i64(0)
                if fmt.group:
                    group = T.floordiv(step * i64(STEP) + i64(part * span), i64(fmt.group))
                group = T.Bind(group)
                if fmt.group:
                    prefetch(weights.scale_address(i64(0), following, group), cache=2)
                factors = self._rounding(panel, group, inverse)
            for number in range(span // width):
                first = part * span + number * width
                at = T.Bind(step * i64(STEP // width) + i64(first // width))
                if first // width % weights.words_per_line == 0:
                    prefetch(weights.word_address(i64(0), following, at), cache=2)
                word = T.Bind(weights.word(i64(0), panel, at))
                for field in range(width // 4):
                    row = first // 4 + field
                    found = self._bytes(word, field, factors)
                    T.buffer_store(into, found, [slot, place, i64(row), lanes(i64(0))])

    def _rounding(self, panel: Expr, group: Expr, inverse: Expr) -> tuple[Expr, Expr]:
        """What a code in the upper bits of 16 is multiplied by, and what is added then."""
        scale, base = self._factors(panel, group)

        def halves(value: Expr) -> Expr:
            number = T.reinterpret("int32x16", value + splat(INTEGER_OFFSET))
            number = T.Bind(number - T.broadcast(T.int32(INTEGER_BITS), PANEL))
            low = T.bitwise_and(number, T.broadcast(T.int32(0xFFFF), PANEL))
            high = T.shift_left(number, T.broadcast(T.int32(16), PANEL))
            return T.Bind(T.reinterpret(_INT16, T.bitwise_or(low, high)))

        factor = halves(scale * inverse * splat(2.0 ** (self.bits + 7)))
        half = 128.0
        if base is None:
            return factor, T.broadcast(T.int16(int(half)), _HALVES)
        return factor, halves(base * inverse * splat(256.0) + splat(half))

    def _bytes(self, word: Expr, field: int, factors: tuple[Expr, Expr] | None) -> Expr:
        """Four features' bytes of each row, int32x16."""
        fmt = self.weights.fmt
        flip = sum(self._middle << at for at in range(0, 32, fmt.bits))
        flip -= (flip >> 31) << 32
        word = T.bitwise_xor(word, T.broadcast(T.int32(flip), PANEL))
        if factors is None:
            return word
        factor, offset = factors
        codes = T.reinterpret(f"uint16x{_HALVES}", word)

        def product(at: int) -> Expr:
            """Of the field at bit `at` of each half, in the upper byte of the half."""
            value = codes
            shift = 16 - self.bits - at
            if shift:
                value = T.shift_left(value, T.broadcast(T.uint16(shift), _HALVES))
            if at:
                mask = 0x10000 - (1 << (16 - self.bits))
                value = T.bitwise_and(value, T.broadcast(T.uint16(mask), _HALVES))
            return multiply_halves(T.reinterpret(_INT16, value), factor) + offset

        return upper_bytes(product(4 * field), product(8 + 4 * field))

    def unpack_exact(self, panel: Expr, index: Expr, number: Expr, into: Expr, slot: Expr) -> None:
        """The features of a chunk in `index` as pairs of bfloat16, `[slots, 16, 16]` int32."""
        with T.serial(i64(OUTLIERS // 2)) as pair:
            values = [
                self._exact(panel, T.Bind(index[number, pair * i64(2) + i64(i)])) for i in range(2)
            ]
            T.buffer_store(into, rounded_pairs(*values), [slot, pair, lanes(i64(0))])

    def _exact(self, panel: Expr, feature: Expr) -> Expr:
        """A feature's weights in 16 rows, float32x16."""
        weights = self.weights
        fmt, width = weights.fmt, weights.width
        at = T.Bind(T.Cast("int64", T.max(feature, T.int32(0))))
        word = T.Bind(weights.word(i64(0), panel, T.floordiv(at, i64(width))))
        place = T.floormod(at, i64(4)) * i64(8)
        if width == 8:
            place = place + T.floordiv(T.floormod(at, i64(8)), i64(4)) * i64(4)
        shift = T.Bind(T.Cast("int32", place))
        code = T.shift_right(word, T.broadcast(shift, PANEL))
        code = T.bitwise_and(code, T.broadcast(T.int32((1 << fmt.bits) - 1), PANEL))
        group = T.Bind(T.floordiv(at, i64(fmt.group)) if fmt.group else i64(0))
        value = T.Cast(F32X16, code) * weights.scale(i64(0), panel, group)
        value = value + weights.offset(i64(0), panel, group)
        exists = T.Select(feature < T.int32(0), T.float32(0), T.float32(1))
        return T.Bind(value * T.broadcast(exists, PANEL))


def _emit(task: TileTask, rows: _Rows, panels: _Panels) -> None:
    """Multiplies and stores a task."""
    product, chunks = task.product, panels.chunks
    gated = product.gated is not None
    amx.configure(STEP)
    pair = (amx.PANELS, amx.PANELS)
    totals = None
    if chunks.count > 1 or gated:
        totals = scratch((task.size, task.width, amx.TILE_ROWS, PANEL))
    codes = scratch((amx.PANELS, chunks.size, amx.TILE_ROWS, PANEL), "int32")
    exact = scratch((amx.PANELS, amx.TILE_ROWS, PANEL), "int32")
    exact_sums = scratch((*pair, amx.TILE_ROWS, PANEL))
    sums = scratch((*pair, amx.TILE_ROWS, PANEL), "int32")
    scales = registers(amx.PANELS)

    def stage(number: Expr, slot: Expr) -> None:
        start = chunks.start(number)
        steps = chunks.length(start)
        count = task.stage_panels(slot)
        for p in range(amx.PANELS):
            # Where there is no second one, the first is unpacked again.
            panel = T.Bind(task.panel(slot + T.min(i64(p), count - i64(1))))
            following = T.Bind(task.panel(slot + i64(amx.PANELS + p)))
            put(scales, p, panels.scale(panel, start, steps))
            inverse = T.Bind(splat(1.0) / get(scales, p))
            with T.serial(steps) as step:
                panels.unpack(panel, start + step, inverse, codes, i64(p), step, following)
            panels.unpack_exact(panel, rows.index, number, exact, i64(p))

        def block(group: Expr, groups: int, width: int) -> None:
            tiles = each_sum_tile(groups, width)
            found = [T.Bind(task.first_group + group + i64(g)) for g in range(groups)]

            def multiply(into: Expr, products: Callable[[], None]) -> None:
                for g, p in tiles:
                    amx.clear(amx.sum_tile(g, p))
                products()
                for g, p in tiles:
                    at = first_bytes(into, i64(g), i64(p))
                    amx.store(amx.sum_tile(g, p), at, amx.TILE_BYTES)

            def outliers() -> None:
                activations = [first_bytes(rows.exact, g, number) for g in found]
                weights = [first_bytes(exact, i64(p)) for p in range(width)]
                multiply_step("tdpbf16ps", activations, weights)

            def ordinary() -> None:
                with T.serial(steps) as step:
                    if chunks.count > 1:
                        assert totals is not None
                        for g, p in tiles:
                            prefetch_row(totals, step, group + i64(2 + g), slot + i64(p))
                    activations = [first_bytes(rows.codes, g, start + step) for g in found]
                    weights = [first_bytes(codes, i64(p), step) for p in range(width)]
                    multiply_step("tdpbssd", activations, weights)

            multiply(exact_sums, outliers)
            multiply(sums, ordinary)
            factors = [T.Bind(get(scales, p)) for p in range(width)]
            for g in range(groups):
                first = task.first_row(group + i64(g))

                def value(row: Expr, p: int, g: int = g) -> Expr:
                    scale = T.broadcast(rows.scales[number, found[g], row], PANEL)
                    total = T.Cast(F32X16, sums[i64(g), i64(p), row, lanes(i64(0))])
                    return total * (scale * factors[p]) + exact_sums[
                        i64(g), i64(p), row, lanes(i64(0))
                    ]

                def add(is_first: bool, g: int = g) -> None:
                    assert totals is not None
                    with T.serial(i64(amx.TILE_ROWS)) as row:
                        for p in range(width):
                            at = [group + i64(g), slot + i64(p), row, lanes(i64(0))]
                            total = value(row, p)
                            if not is_first:
                                total = total + totals[*at]
                            T.buffer_store(totals, total, at)

                def finish(g: int = g, first: Expr = first) -> None:
                    with T.serial(T.min(i64(amx.TILE_ROWS), task.num_rows - first)) as row:
                        found_values = []
                        for p in range(width):
                            total = value(row, p)
                            if totals is not None:
                                at = (group + i64(g), slot + i64(p), row, lanes(i64(0)))
                                total = total + totals[*at]
                            found_values.append(T.Bind(total))
                        task.store_row(slot, first + row, found_values)

                if gated:
                    with T.If(number == i64(0)):
                        with T.Then():
                            add(True)
                        with T.Else():
                            add(False)
                elif chunks.count == 1:
                    finish()
                else:
                    with T.If(number == i64(0)):
                        with T.Then():
                            add(True)
                        with T.Else():
                            with T.If(number == i64(chunks.count - 1)):
                                with T.Then():
                                    finish()
                                with T.Else():
                                    add(False)

        task.for_each_block(count, block)

    task.for_each_stage(chunks.count, stage)
    if gated:
        assert totals is not None
        task.store_gated(totals)
    amx.release()


_ = prefetch, tirx
