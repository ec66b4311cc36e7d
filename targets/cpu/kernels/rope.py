"""Rotary position embedding, alone or in one pass with the K/V write after a q/k/v projection.

Su et al., 2021, in the form of transformers: out[i] = x[i] · cos[i] + rotated(x)[i] · sin[i] for
the first R features of a head; the rest passes through. Half-split: rotated(x) = concat(-x[R/2:R],
x[:R/2]). Interleaved: rotated(x)[2i] = -x[2i + 1], rotated(x)[2i + 1] = x[2i]. cos and sin have R
entries a token in both forms.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import Buffer, Expr, PrimFunc

from llmc.errors import UnsupportedError
from llmc.targets.cpu.kernels.kv_pages import (
    key_matrix,
    kv_type,
    value_matrix,
    write_key,
    write_value,
)
from llmc.targets.cpu.kernels.vector import at, for_rows, lanes_of, loader, registers


def rope(
    *,
    heads: int,
    head_dim: int,
    rotary_dim: int,
    interleaved: bool = False,
    tokens: int | None = None,
) -> PrimFunc:
    """Buffers x `[1, T, H, D]`, cos `[1, T, R]`, sin `[1, T, R]`, y `[1, T, H, D]`, all f32.

    Raises UnsupportedError where R is odd or above D.
    """
    _check(head_dim, rotary_dim)

    @T.prim_func(s_tir=True)
    def rope(x_h: T.handle, cos_h: T.handle, sin_h: T.handle, y_h: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t = T.int64()
        rows = T.meta_var(t if tokens is None else tokens)
        x = T.match_buffer(x_h, (1, rows, heads, head_dim), "float32")
        cos = T.match_buffer(cos_h, (1, rows, rotary_dim), "float32")
        sin = T.match_buffer(sin_h, (1, rows, rotary_dim), "float32")
        y = T.match_buffer(y_h, (1, rows, heads, head_dim), "float32")

        @T.inline
        def rotate(token):
            for head in range(heads):
                _rotate(
                    loader(x, [0, token, head]),
                    _storer(y, [0, token, head]),
                    cos,
                    sin,
                    token,
                    head_dim,
                    rotary_dim,
                    interleaved,
                )

        for_rows(rows, heads * head_dim, rotate)

    return rope


def rope_kv_write(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    rotary_dim: int,
    interleaved: bool,
    page_size: int,
    kv_dtype: str,
    group: int,
    num_groups: int,
    tokens: int | None = None,
) -> PrimFunc:
    """Rotates queries and keys of a fused projection and stores keys and values at their slots.

    Buffers: qkv `[1, T, H·D + Kv·D + Kv·Dv]` f32 (q, k, v along the features), cos and sin `[1, T,
    R]` f32, slots `[G, T]` i32, then, written in place, k_pages and v_pages `[P, Kv, elements]` in
    kv_dtype (see kv_pages.py), and q_out `[1, T, H, D]` f32. Slot -1 writes no key and no value.
    Raises UnsupportedError where R is odd or above D, or where the KV type does not fit.
    """
    _check(head_dim, rotary_dim)
    kv = kv_type(kv_dtype, page_size, head_dim)
    keys = key_matrix(kv, head_dim, page_size)
    values = value_matrix(kv, v_head_dim, page_size)
    k_start = num_heads * head_dim
    v_start = k_start + num_kv_heads * head_dim
    features = v_start + num_kv_heads * v_head_dim

    @T.prim_func(s_tir=True)
    def rope_kv_write(
        qkv_h: T.handle,
        cos_h: T.handle,
        sin_h: T.handle,
        slots_h: T.handle,
        k_pages_h: T.handle,
        v_pages_h: T.handle,
        q_out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t, p = T.int64(), T.int64()
        rows = T.meta_var(t if tokens is None else tokens)
        qkv = T.match_buffer(qkv_h, (1, rows, features), "float32")
        cos = T.match_buffer(cos_h, (1, rows, rotary_dim), "float32")
        sin = T.match_buffer(sin_h, (1, rows, rotary_dim), "float32")
        slots = T.match_buffer(slots_h, (num_groups, rows), "int32")
        k_pages = T.match_buffer(k_pages_h, (p, num_kv_heads, keys.elements), kv_dtype)
        v_pages = T.match_buffer(v_pages_h, (p, num_kv_heads, values.elements), kv_dtype)
        q_out = T.match_buffer(q_out_h, (1, rows, num_heads, head_dim), "float32")

        @T.inline
        def rotate_and_write(token):
            for head in range(num_heads):
                _rotate(
                    loader(qkv, [0, token], head * head_dim),
                    _storer(q_out, [0, token, head]),
                    cos,
                    sin,
                    token,
                    head_dim,
                    rotary_dim,
                    interleaved,
                )
            slot: T.let = T.Cast("int64", slots[group, token])
            if slot >= 0:
                page: T.let = slot // page_size
                offset: T.let = slot % page_size
                rotated = registers(head_dim)
                for head in range(num_kv_heads):
                    _rotate(
                        loader(qkv, [0, token], k_start + head * head_dim),
                        _storer(rotated, []),
                        cos,
                        sin,
                        token,
                        head_dim,
                        rotary_dim,
                        interleaved,
                    )
                    write_key(keys.within(k_pages, page, head), offset, loader(rotated, []))
                    write_value(
                        values.within(v_pages, page, head),
                        offset,
                        loader(qkv, [0, token], v_start + head * v_head_dim),
                    )

        # A key's numbers go to as many cache lines, which takes longer than the floats of a row.
        for_rows(rows, 4 * features, rotate_and_write)

    return rope_kv_write


def _check(head_dim: int, rotary_dim: int) -> None:
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UnsupportedError(
            f"rotary embedding of {rotary_dim} features in heads of {head_dim}: "
            "expected an even number up to the head's size"
        )


def _storer(buffer: Buffer, prefix: list[Expr | int]) -> Callable[[Expr | int, int, Expr], None]:
    """store(i, lanes, value): the same for a store to buffer[*prefix, i]."""
    return lambda i, lanes, value: T.buffer_store(buffer, value, [*prefix, at(i, lanes)])


@T.inline
def _rotate(load, store, cos, sin, token, head_dim, rotary_dim, interleaved):
    """One head's features through `load` and `store`."""
    half = T.meta_var(rotary_dim // 2)
    lanes = T.meta_var(1 if interleaved else lanes_of(half))
    for c in range(half // lanes):
        # The pair's two places: neighbours, or half a rotary dimension apart.
        first = T.meta_var(2 * c if interleaved else c * lanes)
        second = T.meta_var(first + (1 if interleaved else half))
        a: T.let = load(first, lanes)
        b: T.let = load(second, lanes)
        store(
            first, lanes, a * cos[0, token, at(first, lanes)] - b * sin[0, token, at(first, lanes)]
        )
        store(
            second,
            lanes,
            b * cos[0, token, at(second, lanes)] + a * sin[0, token, at(second, lanes)],
        )
    rest = T.meta_var(head_dim - rotary_dim)
    rest_lanes = T.meta_var(lanes_of(rest))
    for c in range(rest // rest_lanes):
        store(
            rotary_dim + c * rest_lanes, rest_lanes, load(rotary_dim + c * rest_lanes, rest_lanes)
        )
