"""How keys and values lie in a page, by KV type.

A cache tensor is `[P, Kv, elements]`; its last axis is what one head has in a page of N tokens:

* keys `[D / v, N, v]`, v elements being 16 bytes: a thread that scores a token reads 16 bytes, and
  its neighbour the next token's. D is padded with zeros to whole vectors.
* values `[N, Dv]`: threads lie across the features.

float32 and float16 are what they say, uint16 holds bfloat16. int8 pages end with one float32 scale
a token (four bytes, lowest first): the largest magnitude of the token in this head over 127.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.errors import UnsupportedError
from llmc.targets.building import f32, i64, registers, to_f32
from llmc.targets.gpu.layout import ceildiv

Expr = Any
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KvType:
    """One type of a KV cache; `dtype` is the cache tensor's."""

    dtype: str
    num_bytes: int  # of an element
    scaled: bool = False

    @property
    def vector(self) -> int:
        """Key elements of 16 bytes."""
        return 16 // self.num_bytes

    def to_float(self, stored: Expr) -> Expr:
        """A stored element as float32; int8 still wants its scale."""
        if self.dtype == "uint16":
            return T.reinterpret("float32", T.shift_left(T.Cast("uint32", stored), T.uint32(16)))
        return to_f32(stored)

    def from_float(self, value: Expr) -> Expr:
        """A float32 as it is stored, rounded to nearest; int8 takes it divided by the scale."""
        if self.dtype == "uint16":
            bits = T.Bind(T.reinterpret("uint32", value))
            odd = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
            return T.Cast("uint16", T.shift_right(bits + T.uint32(32767) + odd, T.uint32(16)))
        if self.dtype == "int8":
            return T.Cast("int8", T.Cast("int32", T.round(value)))
        return value if self.dtype == "float32" else T.Cast(self.dtype, value)


KV_TYPES: dict[str, KvType] = {
    kv.dtype: kv
    for kv in (
        KvType(dtype="float32", num_bytes=4),
        KvType(dtype="float16", num_bytes=2),
        KvType(dtype="uint16", num_bytes=2),
        KvType(dtype="int8", num_bytes=1, scaled=True),
    )
}


def kv_type(dtype: str) -> KvType:
    """The type whose cache tensors have `dtype`; UnsupportedError where there is none."""
    if dtype not in KV_TYPES:
        raise UnsupportedError(f"KV type {dtype!r} on a GPU", hint=f"use {', '.join(KV_TYPES)}")
    return KV_TYPES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageShape:
    """One head's keys or values in a page."""

    kv: KvType
    features: int
    page_size: int
    vector: int  # elements of a token that lie together before the next token's follow

    @property
    def padded(self) -> int:
        """Features, filled up to whole vectors."""
        return ceildiv(self.features, self.vector) * self.vector

    @property
    def numbers(self) -> int:
        """Elements before the scales."""
        return self.padded * self.page_size

    @property
    def elements(self) -> int:
        """Elements of the cache tensor, scales included."""
        return self.numbers + (self.page_size * SCALE_BYTES if self.kv.scaled else 0)

    def place(self, offset: Expr, feature: Expr) -> Expr:
        """Where a token's feature lies."""
        if self.vector == self.features:
            return offset * i64(self.vector) + feature
        by = i64(self.vector)
        row = T.floordiv(feature, by) * i64(self.page_size) + offset
        return row * by + T.floormod(feature, by)

    def scale_place(self, offset: Expr) -> Expr:
        """Where a token's scale lies."""
        return i64(self.numbers) + offset * i64(SCALE_BYTES)

    def load_scale(self, pages: Expr, page: Expr, head: Expr, offset: Expr) -> Expr:
        """A token's scale, float32; 1 where the type has none."""
        if not self.kv.scaled:
            return f32(1)
        place = T.Bind(self.scale_place(offset))
        bits: Expr = T.int32(0)
        for byte in range(SCALE_BYTES):
            part = T.Cast("int32", pages[page, head, place + i64(byte)])
            part = T.bitwise_and(part, T.int32(255))
            bits = T.bitwise_or(bits, T.shift_left(part, T.int32(8 * byte)))
        return T.Bind(T.reinterpret("float32", bits))

    def store_scale(self, pages: Expr, page: Expr, head: Expr, offset: Expr, scale: Expr) -> None:
        """Stores a token's scale."""
        place = T.Bind(self.scale_place(offset))
        bits = T.Bind(T.reinterpret("int32", scale))
        for byte in range(SCALE_BYTES):
            part = T.shift_right(T.shift_left(bits, T.int32(24 - 8 * byte)), T.int32(24))
            T.buffer_store(pages, T.Cast("int8", part), [page, head, place + i64(byte)])

    def load(self, pages: Expr, page: Expr, head: Expr, place: Expr, lanes: int) -> list[Expr]:
        """`lanes` consecutive elements as float32, without the scale."""
        if lanes == 1:
            return [T.Bind(self.kv.to_float(pages[page, head, place]))]
        raw = registers((lanes,), self.kv.dtype)
        vector = pages[page, head, T.ramp(place, i64(1), lanes)]
        T.buffer_store(raw, vector, [T.ramp(i64(0), i64(1), lanes)])
        return [T.Bind(self.kv.to_float(raw[i64(lane)])) for lane in range(lanes)]


def key_shape(kv: KvType, head_dim: int, page_size: int) -> PageShape:
    """Keys: vectors of neighbouring tokens side by side."""
    return PageShape(kv=kv, features=head_dim, page_size=page_size, vector=kv.vector)


def value_shape(kv: KvType, v_head_dim: int, page_size: int) -> PageShape:
    """Values: a token's features side by side."""
    return PageShape(kv=kv, features=v_head_dim, page_size=page_size, vector=v_head_dim)
