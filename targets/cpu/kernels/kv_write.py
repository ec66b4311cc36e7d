"""Writes new keys and values into their pages: keys transposed, values as they are."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.cpu.kernels.vector import at, convert, for_rows, lanes_of


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
    place, k_pages `[P, Kv, D, N]` and v_pages `[P, Kv, N, Dv]` in kv_dtype. Slot -1 writes nothing.
    """

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
        k_pages = T.match_buffer(k_pages_h, (p, num_kv_heads, head_dim, page_size), kv_dtype)
        v_pages = T.match_buffer(v_pages_h, (p, num_kv_heads, page_size, v_head_dim), kv_dtype)
        lanes = T.meta_var(lanes_of(v_head_dim))

        @T.inline
        def write(token):
            slot: T.let = T.Cast("int64", slots[group, token])
            if slot >= 0:
                page: T.let = slot // page_size
                offset: T.let = slot % page_size
                for head in range(num_kv_heads):
                    for d in range(head_dim):
                        k_pages[page, head, d, offset] = convert(k[0, token, head, d], kv_dtype)
                    for c in range(v_head_dim // lanes):
                        v_pages[page, head, offset, at(c * lanes, lanes)] = convert(
                            v[0, token, head, at(c * lanes, lanes)], kv_dtype
                        )

        for_rows(rows, num_kv_heads * (head_dim + v_head_dim), write)

    return kv_write
