"""Rotary embedding and the writing of keys and values into pages: a block for each token and head.

rope: RoFormer (Su et al., 2021) with halves paired, as in dialect.Rope. kv_pages.py says how pages
are laid out; slot -1 writes nowhere. Activations are of `dtype`, cos and sin too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.errors import UnsupportedError
from llmc.targets.building import argument, f32, i64, kernel, put, registers, size_var, to_f32, when
from llmc.targets.gpu.kernels.block import (
    launch,
    maximum,
    quotient,
    reduce,
    remainder,
    rows_of,
    strided,
    when_all,
)
from llmc.targets.gpu.kernels.kv_pages import PageShape, key_shape, kv_type, value_shape
from llmc.targets.gpu.parameters import Features, GpuParameters

Expr = Any
Load = Callable[[Expr], Expr]


def rope(
    *,
    heads: int,
    head_dim: int,
    rotary_dim: int,
    tokens: int | None,
    dtype: str,
    params: GpuParameters,
) -> PrimFunc:
    """Buffers x `[1, T, H, D]`, cos and sin `[1, T, R]`, y like x."""
    _check(head_dim, rotary_dim)
    with kernel("rope") as built:
        rows = rows_of(tokens)
        x = argument("x", (1, rows, heads, head_dim), dtype)
        tables = [argument(n, (1, rows, rotary_dim), dtype) for n in ("cos", "sin")]
        y = argument("y", (1, rows, heads, head_dim), dtype)
        with (
            launch((rows, heads), (params.row_threads(head_dim),)) as (token, head, thread),
            strided(thread, head_dim, params.row_threads(head_dim)) as column,
        ):

            def load(feature: Expr) -> Expr:
                return to_f32(x[i64(0), token, head, feature])

            rotated = _rotated(load, tables, token, head_dim, rotary_dim)
            put(y, rotated(column), 0, token, head, column)
    return built.func


def kv_write(
    *,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    kv_dtype: str,
    group: int,
    num_groups: int,
    tokens: int | None,
    dtype: str,
    params: GpuParameters,
) -> PrimFunc:
    """Buffers key `[1, T, Kv, D]`, value `[1, T, Kv, Dv]`, slots `[G, T]` i32 and, written in
    place, k_pages and v_pages `[P, Kv, elements]`.

    Raises UnsupportedError where the KV type is unknown.
    """
    kv = kv_type(kv_dtype)
    keys, values = key_shape(kv, head_dim, page_size), value_shape(kv, v_head_dim, page_size)
    with kernel("kv_write") as built:
        rows, pages = rows_of(tokens), size_var("pages")
        key = argument("key", (1, rows, num_kv_heads, head_dim), dtype)
        value = argument("value", (1, rows, num_kv_heads, v_head_dim), dtype)
        slots = argument("slots", (num_groups, rows), "int32")
        k_pages = argument("k_pages", (pages, num_kv_heads, keys.elements), kv_dtype)
        v_pages = argument("v_pages", (pages, num_kv_heads, values.elements), kv_dtype)
        with launch((rows, num_kv_heads), (params.row_threads(head_dim),)) as (token, head, thread):
            slot = T.Bind(T.Cast("int64", slots[i64(group), token]))
            with when_all(slot >= i64(0)):
                write = _Writer(
                    page_size, slot, head, thread, params.row_threads(head_dim), params.features
                )
                write.put(keys, k_pages, lambda c: to_f32(key[i64(0), token, head, c]))
                write.put(values, v_pages, lambda c: to_f32(value[i64(0), token, head, c]))
    return built.func


def rope_kv_write(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    rotary_dim: int,
    page_size: int,
    kv_dtype: str,
    group: int,
    num_groups: int,
    tokens: int | None,
    dtype: str,
    params: GpuParameters,
) -> PrimFunc:
    """Rotates query and key of a fused projection, keeps the query, writes key and value.

    Buffers qkv `[1, T, H·D + Kv·D + Kv·Dv]`, cos and sin `[1, T, R]`, slots `[G, T]` i32, k_pages
    and v_pages (in place), query `[1, T, H, D]`. Raises UnsupportedError as the two above.
    """
    _check(head_dim, rotary_dim)
    kv = kv_type(kv_dtype)
    keys, values = key_shape(kv, head_dim, page_size), value_shape(kv, v_head_dim, page_size)
    k_start = num_heads * head_dim
    v_start = k_start + num_kv_heads * head_dim
    width = v_start + num_kv_heads * v_head_dim
    with kernel("rope_kv_write") as built:
        rows, pages = rows_of(tokens), size_var("pages")
        qkv = argument("qkv", (1, rows, width), dtype)
        tables = [argument(n, (1, rows, rotary_dim), dtype) for n in ("cos", "sin")]
        slots = argument("slots", (num_groups, rows), "int32")
        k_pages = argument("k_pages", (pages, num_kv_heads, keys.elements), kv_dtype)
        v_pages = argument("v_pages", (pages, num_kv_heads, values.elements), kv_dtype)
        query = argument("query", (1, rows, num_heads, head_dim), dtype)
        grid = (rows, num_heads + num_kv_heads)
        with launch(grid, (params.row_threads(head_dim),)) as (token, head, thread):

            def load(start: Expr) -> Load:
                return lambda c: to_f32(qkv[i64(0), token, start + c])

            # Key heads follow the query heads, so one formula finds both.
            rotated = _rotated(load(head * i64(head_dim)), tables, token, head_dim, rotary_dim)
            is_query = head < i64(num_heads)
            with when(is_query), strided(thread, head_dim, params.row_threads(head_dim)) as column:
                put(query, rotated(column), 0, token, head, column)
            slot = T.Bind(T.Cast("int64", slots[i64(group), token]))
            with when_all(T.And(T.Not(is_query), slot >= i64(0))):
                kv_head = T.Bind(head - i64(num_heads))
                write = _Writer(
                    page_size, slot, kv_head, thread, params.row_threads(head_dim), params.features
                )
                write.put(keys, k_pages, rotated)
                write.put(values, v_pages, load(i64(v_start) + kv_head * i64(v_head_dim)))
    return built.func


def _check(head_dim: int, rotary_dim: int) -> None:
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UnsupportedError(
            f"rotary embedding of {rotary_dim} features in heads of {head_dim}: "
            "expected an even number up to the head's size"
        )


def _rotated(load: Load, tables: list[Expr], token: Expr, head_dim: int, rotary_dim: int) -> Load:
    """The rotated feature number `column` of the head that `load` reads."""
    half = i64(rotary_dim // 2)
    cos, sin = tables

    def rotate(column: Expr) -> Expr:
        first = column < half
        other = load(T.Select(first, column + half, column - half))
        value = load(column) * to_f32(cos[i64(0), token, column])
        turned = T.Select(first, f32(0) - other, other)
        return value + turned * to_f32(sin[i64(0), token, column])

    def at(column: Expr) -> Expr:
        if rotary_dim == head_dim:
            return rotate(column)
        return T.if_then_else(column < i64(rotary_dim), rotate(column), load(column))

    return at


@dataclass(frozen=True, slots=True)
class _Writer:
    """Puts one head of one token into its slot; all threads of the block have to come here."""

    page_size: int
    slot: Expr
    head: Expr
    thread: Expr
    threads: int
    features: Features

    def put(self, shape: PageShape, pages: Expr, load: Load) -> None:
        """load(0 … features - 1) into the page, padding as zeros."""
        page = T.Bind(quotient(self.slot, self.page_size))
        offset = T.Bind(remainder(self.slot, self.page_size))
        inverse = self._scale(shape, pages, page, offset, load) if shape.kv.scaled else None
        with strided(self.thread, shape.padded, self.threads) as column:
            value = load(column)
            if shape.padded != shape.features:
                value = T.if_then_else(column < i64(shape.features), value, f32(0))
            if inverse is not None:
                value = value * inverse
            stored = shape.kv.from_float(T.Bind(value))
            T.buffer_store(pages, stored, [page, self.head, T.Bind(shape.place(offset, column))])

    def _scale(self, shape: PageShape, pages: Expr, page: Expr, offset: Expr, load: Load) -> Expr:
        """Stores the token's scale and returns what its numbers are multiplied by."""
        largest = registers((1,))
        put(largest, f32(0), 0)
        with strided(self.thread, shape.features, self.threads) as column:
            value = T.Bind(load(column))
            put(largest, T.max(largest[i64(0)], T.max(value, f32(0) - value)), 0)
        whole = reduce(largest[i64(0)], maximum, self.thread, self.threads, self.features)
        with when(self.thread == i64(0)):
            scale = T.Bind(whole * f32(1 / 127))
            shape.store_scale(pages, page, self.head, offset, scale)
        return T.Bind(T.if_then_else(whole > f32(0), f32(127) / whole, f32(0)))
