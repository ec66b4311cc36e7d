"""How keys and values lie in a page, by KV type.

A page holds, for each K/V head, a matrix of N tokens: keys `[D, N]` (tokens across), values
`[N, Dv]` (features across). A cache tensor is `[P, Kv, elements]`, its last axis one matrix:

* float32, float16: row after row.
* bfloat16 (as uint16): rows 2i and 2i + 1 interleaved, element by element. Two neighbours make one
  32-bit word, which is what dot-product instructions multiply.
* int8: row after row, then one float32 scale a token. A value is its code times its token's scale,
  which is the largest magnitude of the token in this head, over 127.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.errors import UnsupportedError
from llmc.targets.building import i64
from llmc.targets.cpu.kernels import bfloat16
from llmc.targets.cpu.kernels.bfloat16 import typed
from llmc.targets.cpu.kernels.math import lane_max, nearest
from llmc.targets.cpu.kernels.vector import at, convert, lanes_of, registers, spread

Expr = Any
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class KvType:
    """One type of a KV cache; `dtype` is the cache tensor's."""

    dtype: str
    num_bytes: int  # of an element
    unit: int = 1  # rows that lie interleaved
    scaled: bool = False


KV_TYPES: dict[str, KvType] = {
    kv.dtype: kv
    for kv in (
        KvType(dtype="float32", num_bytes=4),
        KvType(dtype="float16", num_bytes=2),
        KvType(dtype="uint16", num_bytes=2, unit=2),
        KvType(dtype="int8", num_bytes=1, scaled=True),
    )
}


def kv_type(dtype: str, page_size: int, head_dim: int) -> KvType:
    """The type whose cache tensors have `dtype`; UnsupportedError where keys do not fit it."""
    if dtype not in KV_TYPES:
        raise UnsupportedError(f"KV type {dtype!r} on the CPU", hint=f"use {', '.join(KV_TYPES)}")
    kv = KV_TYPES[dtype]
    if page_size % 8:
        raise UnsupportedError(
            f"page size {page_size} is not a multiple of 8", hint="use pages of 16 or 32 tokens"
        )
    if head_dim % kv.unit:
        raise UnsupportedError(
            f"bfloat16 keys of an odd head size, {head_dim}", hint="use another KV type"
        )
    return kv


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixShape:
    """Keys `[D, N]` or values `[N, Dv]` of one head in a page."""

    kv: KvType
    rows: int
    columns: int
    page_size: int

    @property
    def elements(self) -> int:
        """Elements of the cache tensor that the matrix takes, its scales included."""
        scales = self.page_size * SCALE_BYTES if self.kv.scaled else 0
        return self.rows * self.columns + scales

    @property
    def num_bytes(self) -> int:
        """Bytes of them."""
        return self.elements * self.kv.num_bytes

    def within(self, buffer: Expr, page: Expr, head: Expr) -> PageMatrix:
        """The matrix of one page and head of a cache tensor."""
        return PageMatrix(
            kv=self.kv, buffer=buffer, page=page, head=head, rows=self.rows, columns=self.columns
        )


def key_matrix(kv: KvType, head_dim: int, page_size: int) -> MatrixShape:
    """The shape `[D, N]`."""
    return MatrixShape(kv=kv, rows=head_dim, columns=page_size, page_size=page_size)


def value_matrix(kv: KvType, v_head_dim: int, page_size: int) -> MatrixShape:
    """The shape `[N, Dv]`."""
    return MatrixShape(kv=kv, rows=page_size, columns=v_head_dim, page_size=page_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMatrix:
    """The keys `[D, N]` or values `[N, Dv]` of one head in one page."""

    kv: KvType
    buffer: Expr  # [P, Kv, elements]
    page: Expr
    head: Expr
    rows: int
    columns: int

    def load(self, step: Expr, column: Expr, lanes: int, limit: Expr | None = None) -> list[Expr]:
        """`lanes` columns of rows unit · step …, a float32 vector for each row.

        int8 codes come without their scale. Rows from `limit` on are zero where the type
        interleaves them with rows before.
        """
        if self.kv.unit == 2:
            return bfloat16.halves(self.load_pairs(step, column, lanes, limit))
        stored = self.buffer[self._index(step * i64(self.columns) + column, lanes)]
        return [stored if self.kv.dtype == "float32" else convert(stored, "float32")]

    def bits(self, row: Expr, column: Expr, lanes: int) -> Expr:
        """`lanes` columns of a row of float16 as they are stored, uint16."""
        stored = self.buffer[self._index(row * i64(self.columns) + column, lanes)]
        return T.reinterpret(typed("uint16", lanes), stored)

    def load_pairs(self, step: Expr, column: Expr, lanes: int, limit: Expr | None = None) -> Expr:
        """The same of interleaved rows, as int32 pairs."""
        start = (step * i64(self.columns) + column) * i64(2)
        pairs = T.reinterpret(typed("int32", lanes), self.buffer[self._index(start, 2 * lanes)])
        if limit is None:
            return pairs
        kept = T.Select(step * i64(2) + i64(1) < limit, T.int32(-1), T.int32(0xFFFF))
        return T.bitwise_and(pairs, spread(kept, lanes))

    def scales(self, token: Expr, lanes: int) -> Expr:
        """Scales of `lanes` tokens, float32."""
        start = i64(self.rows * self.columns) + token * i64(SCALE_BYTES)
        return T.reinterpret(
            typed("float32", lanes), self.buffer[self._index(start, SCALE_BYTES * lanes)]
        )

    def address(self, num_bytes: Expr) -> Expr:
        """Where the matrix' byte `num_bytes` lies."""
        return T.address_of(
            self.buffer[self.page, self.head, T.floordiv(num_bytes, i64(self.kv.num_bytes))]
        )

    def store(self, row: Expr, column: Expr, value: Expr) -> None:
        """Stores float32 values (int8: codes) from `column` of one row on."""
        lanes = value.ty.dtype.lanes
        flat = row * i64(self.columns) + column
        if self.kv.unit == 1:
            stored = value if self.kv.dtype == "float32" else convert(value, self.kv.dtype)
            T.buffer_store(self.buffer, stored, self._index(flat, lanes))
            return
        start = T.floordiv(row, i64(2)) * i64(2 * self.columns) + T.floormod(row, i64(2))
        halves = bfloat16.from_float32(value)
        index = start + column * i64(2)
        where = index if lanes == 1 else T.ramp(index, i64(2), lanes)
        T.buffer_store(self.buffer, halves, [self.page, self.head, where])

    def store_scale(self, token: Expr, scale: Expr) -> None:
        """Stores a token's scale, float32."""
        start = i64(self.rows * self.columns) + token * i64(SCALE_BYTES)
        T.buffer_store(self.buffer, T.reinterpret("int8x4", scale), self._index(start, SCALE_BYTES))

    def _index(self, flat: Expr, lanes: int) -> list[Expr]:
        return [self.page, self.head, at(flat, lanes)]


def write_key(matrix: PageMatrix, token: Expr, load: Callable[[Expr, int], Expr]) -> None:
    """Stores a token's key, a column; load(d, lanes) gives features of it."""
    inverse = _write_scale(matrix, token, load, matrix.rows) if matrix.kv.scaled else None
    with T.serial(i64(matrix.rows)) as d:
        value = load(d, 1)
        matrix.store(d, token, value if inverse is None else nearest(value * inverse))


def write_value(matrix: PageMatrix, token: Expr, load: Callable[[Expr, int], Expr]) -> None:
    """Stores a token's value, a row; load(c, lanes) gives features of it."""
    lanes = lanes_of(matrix.columns)
    inverse = _write_scale(matrix, token, load, matrix.columns) if matrix.kv.scaled else None
    with T.serial(i64(matrix.columns // lanes)) as c:
        column = c * i64(lanes)
        value = load(column, lanes)
        if inverse is not None:
            value = nearest(value * spread(inverse, lanes))
        matrix.store(token, column, value)


def _write_scale(
    matrix: PageMatrix, token: Expr, load: Callable[[Expr, int], Expr], features: int
) -> Expr:
    """Stores a token's scale, its largest magnitude over 127; returns 1 / scale, 0 for zeros."""
    lanes = lanes_of(features)
    largest, scales = registers(lanes), registers(2)
    everything, zero, one = at(i64(0), lanes), i64(0), i64(1)
    T.buffer_store(largest, spread(T.float32(0), lanes), [everything])
    with T.serial(i64(features // lanes)) as c:
        value = load(c * i64(lanes), lanes)
        magnitude = T.max(value, spread(T.float32(0), lanes) - value)
        T.buffer_store(largest, T.max(largest[everything], magnitude), [everything])
    T.buffer_store(scales, lane_max(largest[everything]) * T.float32(1 / 127), [zero])
    matrix.store_scale(token, scales[zero])
    inverse = T.Select(scales[zero] > T.float32(0), T.float32(1) / scales[zero], T.float32(0))
    T.buffer_store(scales, inverse, [one])
    return scales[one]
