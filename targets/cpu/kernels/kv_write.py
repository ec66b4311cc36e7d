"""Writes new keys and values into their pages; kv_pages.py says how they lie there."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.cpu.kernels.kv_pages import (
    key_matrix,
    kv_type,
    value_matrix,
    write_key,
    write_value,
)
from llmc.targets.cpu.kernels.vector import for_rows, loader


def kv_write(
    *,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    kv_dtype: str,
    group: int,
    num_groups: int,
    tokens: int | None = None,
) -> PrimFunc:
    """Stores each token's key and value at its slot.

    Buffers: k `[1, T, Kv, D]` f32, v `[1, T, Kv, Dv]` f32, slots `[G, T]` i32, and, written in
    place, k_pages and v_pages `[P, Kv, elements]` in kv_dtype. Slot -1 writes nothing. Raises
    UnsupportedError where the KV type is unknown or does not fit the head size.
    """
    kv = kv_type(kv_dtype, page_size, head_dim)
    keys = key_matrix(kv, head_dim, page_size)
    values = value_matrix(kv, v_head_dim, page_size)

    @T.prim_func(s_tir=True)
    def kv_write(
        k_h: T.handle, v_h: T.handle, slots_h: T.handle, k_pages_h: T.handle, v_pages_h: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t, p = T.int64(), T.int64()
        rows = T.meta_var(t if tokens is None else tokens)
        k = T.match_buffer(k_h, (1, rows, num_kv_heads, head_dim), "float32")
        v = T.match_buffer(v_h, (1, rows, num_kv_heads, v_head_dim), "float32")
        slots = T.match_buffer(slots_h, (num_groups, rows), "int32")
        k_pages = T.match_buffer(k_pages_h, (p, num_kv_heads, keys.elements), kv_dtype)
        v_pages = T.match_buffer(v_pages_h, (p, num_kv_heads, values.elements), kv_dtype)

        @T.inline
        def write(token):
            slot: T.let = T.Cast("int64", slots[group, token])
            if slot >= 0:
                page: T.let = slot // page_size
                offset: T.let = slot % page_size
                for head in range(num_kv_heads):
                    write_key(keys.within(k_pages, page, head), offset, loader(k, [0, token, head]))
                    write_value(
                        values.within(v_pages, page, head), offset, loader(v, [0, token, head])
                    )

        for_rows(rows, num_kv_heads * (head_dim + v_head_dim), write)

    return kv_write
