"""Reading a packed weight matrix (see targets/gpu/layout.py) inside a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, f32, i64, registers, to_f32
from llmc.targets.gpu.layout import (
    CHUNK_WORDS,
    PANEL,
    chunk_features,
    chunks_per_group,
    code_offsets,
    groups_per_chunk,
    num_chunks,
    num_panels,
    packed_parts,
)

Expr = Any


@dataclass(frozen=True, slots=True)
class Weights:
    """The buffers of one packed matrix (or of a stack of experts)."""

    fmt: WeightFormat
    m: int
    k: int
    stacked: bool
    buffers: tuple[Expr, ...]

    @classmethod
    def arguments(
        cls, fmt: WeightFormat, m: int, k: int, num_experts: int | None = None
    ) -> Weights:
        """Declares the packed arrays as the kernel's next arguments."""
        parts = packed_parts(fmt, m, k, num_experts=num_experts)
        buffers = tuple(argument(f"weight_{p.suffix}", p.shape, p.dtype) for p in parts)
        return cls(fmt, m, k, num_experts is not None, buffers)

    @property
    def panels(self) -> int:
        """Panels of 32 rows."""
        return num_panels(self.m)

    @property
    def chunks(self) -> int:
        """Chunks in a row."""
        return num_chunks(self.fmt, self.k)

    @property
    def features(self) -> int:
        """Input features in a chunk."""
        return chunk_features(self.fmt)

    def chunk(self, expert: Expr | None, panel: Expr, chunk: Expr, lane: Expr) -> Chunk:
        """One row's chunk, loaded: 16 bytes and its scales."""
        at = (panel, chunk, lane) if expert is None else (expert, panel, chunk, lane)
        dtype = str(self.buffers[0].ty.dtype)
        words = registers((CHUNK_WORDS,), dtype)
        whole = T.ramp(i64(0), i64(1), CHUNK_WORDS)
        T.buffer_store(words, self.buffers[0][(*at, T.ramp(i64(0), i64(1), CHUNK_WORDS))], [whole])
        if self.fmt.is_float:
            return Chunk(self.fmt, words, [], [])
        scales, offsets = [], []
        per_chunk = groups_per_chunk(self.fmt)
        first = T.Bind(
            chunk * i64(per_chunk)
            if per_chunk > 1
            else T.floordiv(chunk, i64(chunks_per_group(self.fmt, self.k)))
        )
        for part in range(per_chunk):
            group = first + i64(part)
            place = (panel, group, lane) if expert is None else (expert, panel, group, lane)
            scale = to_f32(self.buffers[1][place])
            scale = T.Bind(scale * f32(256) if self.fmt.float_codes else scale)
            scales.append(scale)
            if self.fmt.has_min:
                offsets.append(T.Bind(to_f32(self.buffers[2][place])))
            elif self.fmt.zero_point:
                offsets.append(T.Bind(scale * f32(-float(self.fmt.zero_point))))
        return Chunk(self.fmt, words, scales, offsets)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Four loaded words and what turns their codes into weights."""

    fmt: WeightFormat
    words: Expr
    scales: list[Expr]
    offsets: list[Expr]

    def values(self) -> list[Expr]:
        """The weights of the chunk's features in their order, float32."""
        features = chunk_features(self.fmt)
        per_word = features // CHUNK_WORDS
        values: list[Expr] = [None] * features
        for word in range(CHUNK_WORDS):
            bits = self.words[i64(word)]
            for position, offset in enumerate(code_offsets(self.fmt.bits)):
                feature = word * per_word + offset
                values[feature] = self._value(bits, position, feature)
        return values

    def _value(self, bits: Expr, position: int, feature: int) -> Expr:
        fmt = self.fmt
        if fmt.float_dtype is not None:
            return _float_value(fmt, bits, position)
        code = to_f32(_code(fmt, bits, position))
        part = feature * len(self.scales) // chunk_features(fmt)
        value = code * self.scales[part]
        return value + self.offsets[part] if self.offsets else value


def _code(fmt: WeightFormat, bits: Expr, position: int) -> Expr:
    """The code at a position of a word: sign-extended where codes are signed."""
    shift = position * fmt.bits
    if fmt.float_codes:
        return _float_code(bits, shift)
    if fmt.code_dtype == "int8":
        up = 32 - fmt.bits - shift
        moved = T.shift_left(bits, T.int32(up)) if up else bits
        return T.shift_right(moved, T.int32(32 - fmt.bits))
    moved = T.shift_right(bits, T.int32(shift)) if shift else bits
    return T.bitwise_and(moved, T.int32((1 << fmt.bits) - 1))


def _float_code(bits: Expr, shift: int) -> Expr:
    """256th of an e4m3 number: as a float16 with its bits, whose exponent's bias is 8 more."""
    moved = T.shift_right(bits, T.int32(shift)) if shift else bits
    sign = T.shift_left(T.bitwise_and(moved, T.int32(128)), T.int32(8))
    half = T.bitwise_or(T.shift_left(T.bitwise_and(moved, T.int32(127)), T.int32(7)), sign)
    return T.reinterpret("float16", T.Cast("uint16", half))


def _float_value(fmt: WeightFormat, bits: Expr, position: int) -> Expr:
    if fmt.bits == 32:
        return bits
    if fmt.float_dtype == "bfloat16":  # the upper half of a float32
        half = T.bitwise_and(bits, T.int32(-65536)) if position else T.shift_left(bits, T.int32(16))
        return T.reinterpret("float32", half)
    half = T.shift_right(bits, T.int32(16)) if position else bits
    return to_f32(T.reinterpret("float16", T.Cast("uint16", T.bitwise_and(half, T.int32(65535)))))


def panel_lane(row: Expr) -> tuple[Expr, Expr]:
    """Where a row lies: its panel and its place in it."""
    return T.floordiv(row, i64(PANEL)), T.floormod(row, i64(PANEL))
