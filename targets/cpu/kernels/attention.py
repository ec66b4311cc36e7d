"""Paged attention for CPUs: one kernel for prefill chunks, decodes and any mixture of them.

A work item is a tile (a few new tokens of one sequence) times one K/V head; attention_tile.py says
how it is done. Here is how a ragged batch becomes work items.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import Expr, PrimFunc

from llmc.errors import UnsupportedError
from llmc.targets.cpu.kernels.attention_tile import (
    KV_BYTES,
    AttentionTuning,
    Pages,
    Plan,
    Running,
    attend_pages,
    first_seen_page,
    merge_runs,
    write_rows,
)

__all__ = ["AttentionTuning", "paged_attention"]


def paged_attention(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    kv_dtype: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    group: int,
    num_groups: int,
    tokens: int | None = None,
    tuning: AttentionTuning | None = None,
) -> PrimFunc:
    """Attention of new tokens over their sequences' pages, causal.

    Buffers in order: q `[1, T, H, D]` f32, q_starts `[S+1]` i32, kv_lens `[S]` i32, block_tables
    `[G, S, B]` i32, k_pages `[P, Kv, D, N]`, v_pages `[P, Kv, N, Dv]` (kv_dtype), sinks `[H]` f32
    (only with `sinks`), out `[1, T, H, Dv]` f32. docs/shapes.md explains the ragged batch; rows
    from `q_starts[S]` on are not written.

    A position i sees j with i - window < j <= i; pages wholly outside are not read, nor are their
    table entries. `softcap` replaces a score s by softcap · tanh(s / softcap). A sink is one more
    logit of its head, whose probability is dropped. `tokens` is T where it is fixed; 1 gives a
    kernel that splits the context in parallel. Raises UnsupportedError where the heads do not
    divide, the page size is no multiple of 8, or the KV type is unknown.
    """
    if num_heads % num_kv_heads:
        raise UnsupportedError(
            f"attention with {num_heads} query heads over {num_kv_heads} K/V heads: "
            "the first must be a multiple of the second"
        )
    if page_size % 8:
        raise UnsupportedError(
            f"page size {page_size} is not a multiple of 8", hint="use pages of 16 or 32 tokens"
        )
    if kv_dtype not in KV_BYTES:
        raise UnsupportedError(f"KV type {kv_dtype!r} on the CPU", hint="use float32 or float16")
    plan = Plan(
        num_kv_heads=num_kv_heads,
        heads=num_heads // num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_size=page_size,
        kv_dtype=kv_dtype,
        scale=scale,
        window=window,
        softcap=softcap,
        group=group,
        tuning=tuning or AttentionTuning(),
    )
    build = _with_sinks if sinks else _without_sinks
    return build(plan, num_groups, tokens)


def _with_sinks(plan: Plan, num_groups: int, tokens: int | None) -> PrimFunc:
    attend = _attend_one_token if tokens == 1 else _attend_tiles
    kv, n, d, dv, dtype = _sizes(plan)
    num_heads = kv * plan.heads

    @T.prim_func(s_tir=True)
    def paged_attention_sinks(
        q_h: T.handle,
        q_starts_h: T.handle,
        kv_lens_h: T.handle,
        tables_h: T.handle,
        k_h: T.handle,
        v_h: T.handle,
        sinks_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t, s, b, p = T.int64(), T.int64(), T.int64(), T.int64()
        rows = T.meta_var(_extent(t, tokens))
        q = T.match_buffer(q_h, (1, rows, num_heads, d), "float32")
        q_starts = T.match_buffer(q_starts_h, (s + 1,), "int32")
        kv_lens = T.match_buffer(kv_lens_h, (s,), "int32")
        tables = T.match_buffer(tables_h, (num_groups, s, b), "int32")
        k_pages = T.match_buffer(k_h, (p, kv, d, n), dtype)
        v_pages = T.match_buffer(v_h, (p, kv, n, dv), dtype)
        sinks = T.match_buffer(sinks_h, (num_heads,), "float32")
        out = T.match_buffer(out_h, (1, rows, num_heads, dv), "float32")
        attend(plan, s, q, q_starts, kv_lens, tables, k_pages, v_pages, sinks, out)

    return paged_attention_sinks


def _without_sinks(plan: Plan, num_groups: int, tokens: int | None) -> PrimFunc:
    attend = _attend_one_token if tokens == 1 else _attend_tiles
    kv, n, d, dv, dtype = _sizes(plan)
    num_heads = kv * plan.heads

    @T.prim_func(s_tir=True)
    def paged_attention(
        q_h: T.handle,
        q_starts_h: T.handle,
        kv_lens_h: T.handle,
        tables_h: T.handle,
        k_h: T.handle,
        v_h: T.handle,
        out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t, s, b, p = T.int64(), T.int64(), T.int64(), T.int64()
        rows = T.meta_var(_extent(t, tokens))
        q = T.match_buffer(q_h, (1, rows, num_heads, d), "float32")
        q_starts = T.match_buffer(q_starts_h, (s + 1,), "int32")
        kv_lens = T.match_buffer(kv_lens_h, (s,), "int32")
        tables = T.match_buffer(tables_h, (num_groups, s, b), "int32")
        k_pages = T.match_buffer(k_h, (p, kv, d, n), dtype)
        v_pages = T.match_buffer(v_h, (p, kv, n, dv), dtype)
        out = T.match_buffer(out_h, (1, rows, num_heads, dv), "float32")
        attend(plan, s, q, q_starts, kv_lens, tables, k_pages, v_pages, None, out)

    return paged_attention


def _sizes(plan: Plan) -> tuple[int, int, int, int, str]:
    return plan.num_kv_heads, plan.page_size, plan.head_dim, plan.v_head_dim, plan.kv_dtype


def _extent(symbol: Expr, tokens: int | None) -> Expr | int:
    return symbol if tokens is None else tokens


@T.inline
def _attend_rows(plan, tile, q, pages, sinks, out, first_row, num_tokens, position):
    """One tile from its queries to its outputs."""
    with T.sblock("rows"):
        T.reads()
        T.writes()
        highest = T.sblock_alloc_buffer((tile.rows,), "float32")
        totals = T.sblock_alloc_buffer((tile.rows, plan.page_lanes), "float32")
        sums = T.sblock_alloc_buffer((tile.rows, plan.v_head_dim), "float32")
        run = T.meta_var(Running(highest, totals, sums, T.int64(0)))
        begin: T.let = first_seen_page(plan, position)
        last: T.let = T.Cast("int64", position) + num_tokens - 1
        end: T.let = last // plan.page_size + 1
        attend_pages(plan, tile, q, first_row, num_tokens, position, pages, begin, end, run)
        write_rows(plan, run, sinks, out, pages.head, first_row, num_tokens)


@T.inline
def _find_sequence(q_starts, num_sequences, tokens, number, found):
    """found[0] = the sequence that owns tile `number`, by bisection; found[1] is scratch."""
    found[0] = T.int64(0)
    found[1] = num_sequences
    while found[0] + 1 < found[1]:
        middle: T.let = (found[0] + found[1]) // 2
        if T.Cast("int64", q_starts[middle]) // tokens + middle <= number:
            found[0] = middle
        else:
            found[1] = middle


@T.inline
def _attend_tiles(plan, num_sequences, q, q_starts, kv_lens, tables, k_pages, v_pages, sinks, out):
    """Any batch: parallel over the tiles of every sequence and K/V heads.

    Sequence s owns the tile numbers from q_starts[s] // tokens + s on; some at its end are empty.
    A contiguous part of the parallel loop takes tiles from both ends, because the late tiles of a
    prompt see more tokens than the early ones.
    """
    many = T.meta_var(plan.prefill_tile())
    one = T.meta_var(plan.tile(1))
    with T.sblock("attention"):
        T.reads()
        T.writes()
        num_tiles: T.let = T.Cast("int64", q_starts[num_sequences]) // many.tokens + num_sequences
        for item in T.parallel(num_tiles * plan.num_kv_heads):
            with T.sblock("item"):
                T.reads()
                T.writes()
                rank: T.let = item % num_tiles
                number: T.let = T.if_then_else(rank % 2 == 0, rank // 2, num_tiles - 1 - rank // 2)
                found = T.sblock_alloc_buffer((2,), "int64", scope="local")
                _find_sequence(q_starts, num_sequences, many.tokens, number, found)
                seq: T.let = found[0]
                start: T.let = T.Cast("int64", q_starts[seq])
                length: T.let = T.Cast("int64", q_starts[seq + 1]) - start
                first: T.let = (number - start // many.tokens - seq) * many.tokens
                num_tokens: T.let = T.min(T.int64(many.tokens), length - first)
                position: T.let = kv_lens[seq] - T.Cast("int32", length - first)
                pages = T.meta_var(Pages(tables, k_pages, v_pages, seq, item // num_tiles))
                row = T.meta_var(start + first)
                if num_tokens == 1:
                    _attend_rows(plan, one, q, pages, sinks, out, row, T.int64(1), position)
                if many.tokens > 1:
                    if num_tokens > 1:
                        _attend_rows(plan, many, q, pages, sinks, out, row, num_tokens, position)


@T.inline
def _attend_one_token(
    plan, num_sequences, q, q_starts, kv_lens, tables, k_pages, v_pages, sinks, out
):
    """One token: parallel over K/V heads and parts of the context, then the parts are merged.

    A short context is walked by the calling thread alone.
    """
    tile = T.meta_var(plan.tile(1))
    parts = T.meta_var(plan.tuning.decode_splits)
    rows = T.meta_var(plan.num_kv_heads * parts * tile.rows)
    with T.sblock("attention"):
        T.reads()
        T.writes()
        highest = T.sblock_alloc_buffer((rows,), "float32")
        totals = T.sblock_alloc_buffer((rows, plan.page_lanes), "float32")
        sums = T.sblock_alloc_buffer((rows, plan.v_head_dim), "float32")
        owner = T.sblock_alloc_buffer((1,), "int64", scope="local")
        num_parts = T.sblock_alloc_buffer((1,), "int64", scope="local")
        owner[0] = T.int64(0)
        for s in range(num_sequences):
            if q_starts[s + 1] > q_starts[s]:
                owner[0] = s
        seq: T.let = owner[0]
        position: T.let = kv_lens[seq] - 1
        begin: T.let = first_seen_page(plan, position)
        end: T.let = T.Cast("int64", position) // plan.page_size + 1
        num_parts[0] = T.if_then_else(end - begin <= plan.serial_pages, T.int64(1), T.int64(parts))
        if num_parts[0] == 1:
            for head in range(plan.num_kv_heads):
                run = T.meta_var(Running(highest, totals, sums, head * parts * tile.rows))
                pages = T.meta_var(Pages(tables, k_pages, v_pages, seq, head))
                attend_pages(
                    plan, tile, q, T.int64(0), T.int64(1), position, pages, begin, end, run
                )
        else:
            share: T.let = (end - begin + (parts - 1)) // parts
            for item in T.parallel(plan.num_kv_heads * parts):
                run = T.meta_var(Running(highest, totals, sums, item * tile.rows))
                pages = T.meta_var(Pages(tables, k_pages, v_pages, seq, item // parts))
                first = T.meta_var(T.min(begin + item % parts * share, end))
                last = T.meta_var(T.min(begin + (item % parts + 1) * share, end))
                attend_pages(
                    plan, tile, q, T.int64(0), T.int64(1), position, pages, first, last, run
                )
        for head in range(plan.num_kv_heads):
            run = T.meta_var(Running(highest, totals, sums, head * parts * tile.rows))
            for part in range(1, num_parts[0]):
                for r in range(plan.heads):
                    merge_runs(plan, run.base + r, run.base + part * tile.rows + r, run)
            write_rows(plan, run, sinks, out, head, T.int64(0), T.int64(1))
