"""Panels of weights as bytes of one scale a chunk of features, for matrix registers.

A code is multiplied by its group's share of the chunk's scale in 16 bits, eight of them behind the
point, and rounded to a byte. Few features of a chunk are made in bfloat16 besides (byte_rows.py).

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels.avx512 import HALVES, INT16, UINT16, scale_halves, upper_bytes
from llmc.targets.cpu.kernels.byte_rows import STEP
from llmc.targets.cpu.kernels.outputs import rounded
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    WeightPanels,
    get,
    lanes,
    prefetch,
    put,
    registers,
    splat,
)
from llmc.targets.cpu.kernels.unpacked_bfloat16 import rounded_pairs
from llmc.targets.cpu.layout import PANEL, stored_zero_point

Expr = Any
_LIMIT = 127.0
PIECE = 32  # features that are unpacked at a time


@dataclass(frozen=True, slots=True)
class BytePanels:
    """How a chunk of a panel becomes tiles."""

    weights: WeightPanels

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
        first: Expr = i64(0)
        count: Expr = i64(1)
        if fmt.group:  # a chunk has whole ones
            first = T.floordiv(start * i64(STEP), i64(fmt.group))
            count = T.floordiv(steps * i64(STEP), i64(fmt.group))
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
        self, panel: Expr, piece: Expr, inverse: Expr, into: Expr, at: list[Expr], following: Expr
    ) -> None:
        """Features PIECE · piece … of a panel as bytes, into the rows of a tile `into[at]`
        `[16, 16]` int32; `inverse` is one over what they stand for. Asks for as many of the panel
        `following`.
        """
        weights = self.weights
        fmt, width = weights.fmt, weights.width
        span = min(fmt.group or PIECE, PIECE)
        top = T.Bind(T.floormod(piece, i64(STEP // PIECE)) * i64(PIECE // 4))
        for part in range(PIECE // span):
            factors: tuple[Expr, Expr] | None = None
            if not self.is_whole:
                group = i64(0)
                if fmt.group:
                    group = T.floordiv(piece * i64(PIECE) + i64(part * span), i64(fmt.group))
                group = T.Bind(group)
                if fmt.group:
                    prefetch(weights.scale_address(i64(0), following, group), cache=2)
                factors = self._rounding(panel, group, inverse)
            for number in range(span // width):
                first = part * span + number * width
                word_at = T.Bind(piece * i64(PIECE // width) + i64(first // width))
                if first // width % weights.words_per_line == 0:
                    prefetch(weights.word_address(i64(0), following, word_at), cache=2)
                word = T.Bind(weights.word(i64(0), panel, word_at))
                for field in range(width // 4):
                    row = top + i64(first // 4 + field)
                    found = self._bytes(word, field, factors)
                    T.buffer_store(into, found, [*at, row, lanes(i64(0))])

    def _rounding(self, panel: Expr, group: Expr, inverse: Expr) -> tuple[Expr, Expr]:
        """What a code in the upper bits of 16 is multiplied by, and what is added then."""
        scale, base = self._factors(panel, group)

        def halves(value: Expr) -> Expr:
            number = T.Bind(rounded(value))
            low = T.bitwise_and(number, T.broadcast(T.int32(0xFFFF), PANEL))
            high = T.shift_left(number, T.broadcast(T.int32(16), PANEL))
            return T.Bind(T.reinterpret(INT16, T.bitwise_or(low, high)))

        factor = halves(scale * inverse * splat(2.0 ** (self.bits + 7)))
        half = 128.0
        if base is None:
            return factor, T.broadcast(T.int16(int(half)), HALVES)
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
        codes = T.reinterpret(UINT16, word)

        def product(at: int) -> Expr:
            """Of the field at bit `at` of each half, in the upper byte of the half."""
            value = codes
            shift = 16 - self.bits - at
            if shift:
                value = T.shift_left(value, T.broadcast(T.uint16(shift), HALVES))
            if at:
                mask = 0x10000 - (1 << (16 - self.bits))
                value = T.bitwise_and(value, T.broadcast(T.uint16(mask), HALVES))
            return scale_halves(T.reinterpret(INT16, value), factor) + offset

        return upper_bytes(product(4 * field), product(8 + 4 * field))

    def exact_pair(self, panel: Expr, features: list[Expr]) -> Expr:
        """Two features in bfloat16, int32x16; zeros for -1."""
        low, high = (self._exact(panel, T.Bind(feature)) for feature in features)
        return rounded_pairs(low, high)

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
