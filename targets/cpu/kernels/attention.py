"""Paged attention for CPUs: one kernel for prefill chunks, decodes and any mixture of them.

The algorithm is FlashAttention's online softmax in float32 (Dao et al., 2022) over blocks of pages. A work item is
a *tile*, a few new tokens of one sequence, times one K/V head; all query heads that share the head make the
tile's rows (token-major), so that each vector of K and V is loaded once for all of them. K pages are transposed,
hence scores have tokens across the lanes; V pages are not, hence outputs have features across the lanes.

Masked scores are -inf and the running maximum starts at a finite number: a block of which a row sees nothing
adds exp(-inf) = 0. V is never read past the last token a tile sees, so stale pages cannot put a NaN in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import Buffer, Expr, PrimFunc

from llmc.errors import UnsupportedError
from llmc.targets.cpu.kernels.math import exp, lane_max, lane_sum, tanh

LOWEST = -3.0e38  # below every score, and finite: LOWEST - LOWEST is 0, not NaN
KV_BYTES = {"float32": 4, "float16": 2}
LANES = 16  # float32 lanes of one vector of the IR; LLVM splits it where registers are narrower


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTuning:
    """Sizes that fit the machine; the defaults suit 32 registers of 512 bits."""

    accumulators: int = 24  # vectors of 16 float32 kept in registers by one inner loop
    tile_rows: int = 48  # most query rows (tokens times heads of a group) of a tile
    block_tokens: int = 128  # K/V tokens between two rescalings
    decode_splits: int = 4  # parts of the context that one-token kernels work on in parallel
    serial_bytes: int = 262_144  # K/V of one token's layer that one thread reads sooner than two wake up


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is known at compile time, for the macros below."""

    num_kv_heads: int
    heads: int  # query heads of one K/V head
    head_dim: int
    v_head_dim: int
    page_size: int
    page_lanes: int
    value_lanes: int
    block_pages: int
    kv_bytes: int
    scale: float
    window: int | None
    softcap: float | None
    group: int
    tuning: AttentionTuning

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.page_size

    @property
    def serial_pages(self) -> int:
        """Longest context of a one-token kernel that one thread walks."""
        features = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return self.tuning.serial_bytes // (features * self.page_size * self.kv_bytes)

    @property
    def query_scale(self) -> float:
        """Queries are scaled once; a softcap works on scores in units of itself."""
        return self.scale if self.softcap is None else self.scale / self.softcap


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """Rows of a tile and how they are walked: `strip` rows at once in registers."""

    tokens: int
    strip: int
    num_strips: int

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return self.strip * self.num_strips


def _tile(plan: _Plan, tokens: int) -> _Tile:
    rows = tokens * plan.heads
    most = plan.tuning.accumulators // 2
    num_strips = -(-rows // most)
    return _Tile(tokens=tokens, strip=-(-rows // num_strips), num_strips=num_strips)


def _vectors_at_once(plan: _Plan, tile: _Tile, num_vectors: int) -> int:
    """The largest divisor of num_vectors whose accumulators fit in registers."""
    return max(
        n
        for n in range(1, num_vectors + 1)
        if num_vectors % n == 0 and (n == 1 or n * tile.strip <= plan.tuning.accumulators)
    )


def _prefill_tile(plan: _Plan) -> _Tile:
    """The tile with the fewest padded rows; the larger one among equals."""
    most = max(1, plan.tuning.tile_rows // plan.heads)
    tiles = [_tile(plan, tokens) for tokens in range(max(1, most // 2), most + 1)]
    return min(tiles, key=lambda t: (t.rows / (t.tokens * plan.heads), -t.tokens))


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
    tokens: int | None,
    tuning: AttentionTuning | None = None,
) -> PrimFunc:
    """Attention of new tokens over their sequences' pages, causal.

    Buffers in order: q `[1, T, H, D]` f32, q_starts `[S+1]` i32, kv_lens `[S]` i32, block_tables `[G, S, B]` i32,
    k_pages `[P, Kv, D, N]`, v_pages `[P, Kv, N, Dv]` (kv_dtype), sinks `[H]` f32 (only with `sinks`),
    out `[1, T, H, Dv]` f32. docs/shapes.md explains the ragged batch; rows after `q_starts[S]` are not written.

    A position i sees j with i - window < j <= i; pages wholly outside are not read, nor are their table entries.
    `softcap` replaces a score s by softcap · tanh(s / softcap). A sink is one more logit of its head, whose
    probability is dropped. `tokens` is T where it is fixed; 1 gives a kernel that splits the context in parallel.
    Raises UnsupportedError where the heads do not divide or the page size is no multiple of 8.
    """
    plan = _plan(
        num_heads, num_kv_heads, head_dim, v_head_dim, page_size, kv_dtype, scale, window, softcap, group,
        tuning or AttentionTuning(),
    )
    attend = _attend_one_token if tokens == 1 else _attend_tiles

    def extent(symbol: Expr) -> Expr | int:
        return symbol if tokens is None else tokens

    if sinks:

        @T.prim_func(s_tir=True)
        def paged_attention_sinks(
            q_h: T.handle, q_starts_h: T.handle, kv_lens_h: T.handle, tables_h: T.handle,
            k_h: T.handle, v_h: T.handle, sinks_h: T.handle, out_h: T.handle,
        ):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            t, s, b, p = T.int64(), T.int64(), T.int64(), T.int64()
            q = T.match_buffer(q_h, (1, extent(t), num_heads, head_dim), "float32")
            q_starts = T.match_buffer(q_starts_h, (s + 1,), "int32")
            kv_lens = T.match_buffer(kv_lens_h, (s,), "int32")
            tables = T.match_buffer(tables_h, (num_groups, s, b), "int32")
            k_pages = T.match_buffer(k_h, (p, num_kv_heads, head_dim, page_size), kv_dtype)
            v_pages = T.match_buffer(v_h, (p, num_kv_heads, page_size, v_head_dim), kv_dtype)
            sink_logits = T.match_buffer(sinks_h, (num_heads,), "float32")
            out = T.match_buffer(out_h, (1, extent(t), num_heads, v_head_dim), "float32")
            attend(plan, s, q, q_starts, kv_lens, tables, k_pages, v_pages, sink_logits, out)

        return paged_attention_sinks

    @T.prim_func(s_tir=True)
    def paged_attention(
        q_h: T.handle, q_starts_h: T.handle, kv_lens_h: T.handle, tables_h: T.handle,
        k_h: T.handle, v_h: T.handle, out_h: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t, s, b, p = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_h, (1, extent(t), num_heads, head_dim), "float32")
        q_starts = T.match_buffer(q_starts_h, (s + 1,), "int32")
        kv_lens = T.match_buffer(kv_lens_h, (s,), "int32")
        tables = T.match_buffer(tables_h, (num_groups, s, b), "int32")
        k_pages = T.match_buffer(k_h, (p, num_kv_heads, head_dim, page_size), kv_dtype)
        v_pages = T.match_buffer(v_h, (p, num_kv_heads, page_size, v_head_dim), kv_dtype)
        out = T.match_buffer(out_h, (1, extent(t), num_heads, v_head_dim), "float32")
        attend(plan, s, q, q_starts, kv_lens, tables, k_pages, v_pages, None, out)

    return paged_attention


def _plan(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    kv_dtype: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    group: int,
    tuning: AttentionTuning,
) -> _Plan:
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
    return _Plan(
        num_kv_heads=num_kv_heads,
        heads=num_heads // num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        page_size=page_size,
        page_lanes=math.gcd(page_size, LANES),
        value_lanes=math.gcd(v_head_dim, LANES),
        block_pages=max(1, tuning.block_tokens // page_size),
        kv_bytes=KV_BYTES[kv_dtype],
        scale=scale,
        window=window,
        softcap=softcap,
        group=group,
        tuning=tuning,
    )


def _wide(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _f32(value: Expr, lanes: int) -> Expr:
    return T.Cast(_wide("float32", lanes), value)


def _lanes(start: Expr, lanes: int) -> Expr:
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def _fill(value: float, lanes: int) -> Expr:
    return _spread(T.float32(value), lanes)


def _registers(num_floats: int) -> Buffer:
    """Accumulators: on the stack, whatever their size, where LLVM turns them into registers.

    TVM would take more than 1 KiB from its workspace pool, which no register allocation reaches.
    """
    return T.alloc_buffer(
        (num_floats,), "float32", scope="local", annotations={"disable_lower_builtin": True}
    )


def _visible(plan: _Plan, score: Expr, token: Expr, position: Expr) -> Expr:
    """-inf where a query at `position` does not see the tokens `token…` of the score's lanes (int32)."""
    lanes = plan.page_lanes
    index = T.ramp(T.int32(0), T.int32(1), lanes)
    hidden = T.broadcast(-T.infinity("float32"), lanes)
    score = T.Select(index <= T.broadcast(position - token, lanes), score, hidden)
    if plan.window is not None:
        first = position - token - T.int32(plan.window)
        score = T.Select(index > T.broadcast(first, lanes), score, hidden)
    return score


def _capped(plan: _Plan, score: Expr) -> Expr:
    return score if plan.softcap is None else tanh(score) * T.float32(plan.softcap)


def _spread(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else T.broadcast(value, lanes)


def _first_seen_page(plan: _Plan, position: Expr) -> Expr:
    """The first page (int64) of a sequence that a query at `position` (int32) sees."""
    if plan.window is None:
        return T.int64(0)
    first = T.max(position - T.int32(plan.window - 1), T.int32(0))
    return T.Cast("int64", first) // plan.page_size


@T.inline
def _score_strip(plan, tile, q_tile, scores, k_pages, page, head, strip, column, token, position):
    """scores[strip's rows, column : column + N] = masked q · K of the page whose first token is `token`."""
    lanes = T.meta_var(plan.page_lanes)
    at_once = T.meta_var(_vectors_at_once(plan, tile, plan.page_size // plan.page_lanes))
    for part in T.unroll(plan.page_size // (lanes * at_once)):
        with T.sblock("score"):
            T.reads()
            T.writes()
            acc = _registers(tile.strip * at_once * lanes)
            for a in T.unroll(tile.strip * at_once):
                acc[_lanes(a * lanes, lanes)] = _fill(0.0, lanes)
            for d in range(plan.head_dim):
                for c in T.unroll(at_once):
                    k: T.let = _f32(
                        k_pages[page, head, d, _lanes((part * at_once + c) * lanes, lanes)], lanes
                    )
                    for r in T.unroll(tile.strip):
                        acc[_lanes((r * at_once + c) * lanes, lanes)] = (
                            acc[_lanes((r * at_once + c) * lanes, lanes)]
                            + T.broadcast(q_tile[strip * tile.strip + r, d], lanes) * k
                        )
            for r in T.unroll(tile.strip):
                for c in T.unroll(at_once):
                    scores[
                        strip * tile.strip + r,
                        _lanes(column + (part * at_once + c) * lanes, lanes),
                    ] = _visible(
                        plan,
                        _capped(plan, acc[_lanes((r * at_once + c) * lanes, lanes)]),
                        token + T.Cast("int32", (part * at_once + c) * lanes),
                        position + T.Cast("int32", (strip * tile.strip + r) // plan.heads),
                    )


@T.inline
def _soften_row(plan, scores, base, highest, totals, corrections, row, num_vectors):
    """Turns a row of scores into exp(score - maximum) and updates its running maximum and sum."""
    lanes = T.meta_var(plan.page_lanes)
    with T.sblock("soften"):
        T.reads()
        T.writes()
        acc = _registers(lanes)
        maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
        acc[_lanes(0, lanes)] = _fill(LOWEST, lanes)
        for c in range(num_vectors):
            acc[_lanes(0, lanes)] = T.max(acc[_lanes(0, lanes)], scores[row, _lanes(c * lanes, lanes)])
        maximum[0] = T.max(highest[base + row], lane_max(acc[_lanes(0, lanes)]))
        corrections[row] = exp(highest[base + row] - maximum[0])
        highest[base + row] = maximum[0]
        acc[_lanes(0, lanes)] = totals[base + row, _lanes(0, lanes)] * T.broadcast(corrections[row], lanes)
        for c in range(num_vectors):
            weight: T.let = exp(
                scores[row, _lanes(c * lanes, lanes)] - T.broadcast(maximum[0], lanes)
            )
            scores[row, _lanes(c * lanes, lanes)] = weight
            acc[_lanes(0, lanes)] = acc[_lanes(0, lanes)] + weight
        totals[base + row, _lanes(0, lanes)] = acc[_lanes(0, lanes)]


@T.inline
def _value_strip(
    plan, tile, scores, corrections, base, sums, v_pages, tables, seq, head, strip, first_page, num_pages, num_visible
):
    """sums[strip's rows] = sums · correction + weights · V of the block's pages."""
    lanes = T.meta_var(plan.value_lanes)
    at_once = T.meta_var(_vectors_at_once(plan, tile, plan.v_head_dim // plan.value_lanes))
    for part in range(plan.v_head_dim // (lanes * at_once)):
        with T.sblock("value"):
            T.reads()
            T.writes()
            acc = _registers(tile.strip * at_once * lanes)
            for r in T.unroll(tile.strip):
                for c in T.unroll(at_once):
                    acc[_lanes((r * at_once + c) * lanes, lanes)] = sums[
                        base + strip * tile.strip + r, _lanes((part * at_once + c) * lanes, lanes)
                    ] * _spread(corrections[strip * tile.strip + r], lanes)
            for j in range(num_pages):
                page: T.let = T.Cast("int64", tables[plan.group, seq, first_page + j])
                for n in range(T.min(T.int64(plan.page_size), num_visible - j * plan.page_size)):
                    for c in T.unroll(at_once):
                        v: T.let = _f32(
                            v_pages[page, head, n, _lanes((part * at_once + c) * lanes, lanes)], lanes
                        )
                        for r in T.unroll(tile.strip):
                            acc[_lanes((r * at_once + c) * lanes, lanes)] = (
                                acc[_lanes((r * at_once + c) * lanes, lanes)]
                                + _spread(scores[strip * tile.strip + r, j * plan.page_size + n], lanes) * v
                            )
            for r in T.unroll(tile.strip):
                for c in T.unroll(at_once):
                    sums[
                        base + strip * tile.strip + r, _lanes((part * at_once + c) * lanes, lanes)
                    ] = acc[_lanes((r * at_once + c) * lanes, lanes)]


@T.inline
def _attend_pages(
    plan, tile, q, tables, k_pages, v_pages, seq, head, first_row, num_tokens, position, page_begin, page_end,
    base, highest, totals, sums,
):
    """Online softmax of a tile over the pages [page_begin, page_end) of its sequence, for one K/V head.

    Leaves, from row `base` on, each row's maximum in `highest`, the lane sums of its weights in `totals` and its
    weighted V in `sums`.
    """
    with T.sblock("tile"):
        T.reads()
        T.writes()
        q_tile = T.sblock_alloc_buffer((tile.rows, plan.head_dim), "float32")
        scores = T.sblock_alloc_buffer((tile.rows, plan.block_tokens), "float32")
        corrections = T.sblock_alloc_buffer((tile.rows,), "float32")
        num_rows: T.let = num_tokens * plan.heads
        num_strips: T.let = (num_rows + (tile.strip - 1)) // tile.strip
        num_blocks: T.let = (page_end - page_begin + (plan.block_pages - 1)) // plan.block_pages
        num_seen: T.let = T.Cast("int64", position) + num_tokens
        for r in range(num_strips * tile.strip):
            highest[base + r] = T.float32(LOWEST)
            for c in T.unroll(plan.page_lanes):
                totals[base + r, c] = T.float32(0)
            for d in range(plan.v_head_dim):
                sums[base + r, d] = T.float32(0)
            for d in range(plan.head_dim):
                q_tile[r, d] = T.float32(plan.query_scale) * T.if_then_else(
                    r < num_rows,
                    q[0, first_row + r // plan.heads, head * plan.heads + r % plan.heads, d],
                    T.float32(0),
                )
        for block in range(num_blocks):
            first_page: T.let = page_begin + block * plan.block_pages
            num_pages: T.let = T.min(T.int64(plan.block_pages), page_end - first_page)
            for j in range(num_pages):
                page: T.let = T.Cast("int64", tables[plan.group, seq, first_page + j])
                for strip in range(num_strips):
                    _score_strip(
                        plan, tile, q_tile, scores, k_pages, page, head, strip, j * plan.page_size,
                        T.Cast("int32", (first_page + j) * plan.page_size), position,
                    )
            for r in range(num_rows):
                _soften_row(
                    plan, scores, base, highest, totals, corrections, r,
                    num_pages * (plan.page_size // plan.page_lanes),
                )
            for strip in range(num_strips):
                _value_strip(
                    plan, tile, scores, corrections, base, sums, v_pages, tables, seq, head, strip, first_page,
                    num_pages, num_seen - first_page * plan.page_size,
                )


@T.inline
def _write_rows(plan, highest, totals, sums, sinks, out, head, first_row, num_rows, base):
    """out = sums / (totals + the sink's weight) for a finished tile."""
    for r in range(num_rows):
        with T.sblock("finish"):
            T.reads()
            T.writes()
            share = T.sblock_alloc_buffer((1,), "float32", scope="local")
            share[0] = lane_sum(totals[base + r, _lanes(0, plan.page_lanes)])
            if sinks is not None:
                share[0] = share[0] + exp(sinks[head * plan.heads + r % plan.heads] - highest[base + r])
            share[0] = T.float32(1) / share[0]
            for d in range(plan.v_head_dim):
                out[0, first_row + r // plan.heads, head * plan.heads + r % plan.heads, d] = (
                    sums[base + r, d] * share[0]
                )


@T.inline
def _attend_rows(
    plan, tile, q, tables, k_pages, v_pages, sinks, out, seq, head, first_row, num_tokens, position
):
    """One tile from its queries to its outputs."""
    with T.sblock("rows"):
        T.reads()
        T.writes()
        highest = T.sblock_alloc_buffer((tile.rows,), "float32")
        totals = T.sblock_alloc_buffer((tile.rows, plan.page_lanes), "float32")
        sums = T.sblock_alloc_buffer((tile.rows, plan.v_head_dim), "float32")
        _attend_pages(
            plan, tile, q, tables, k_pages, v_pages, seq, head, first_row, num_tokens, position,
            _first_seen_page(plan, position),
            (T.Cast("int64", position) + num_tokens + (plan.page_size - 1)) // plan.page_size,
            T.int64(0), highest, totals, sums,
        )
        _write_rows(
            plan, highest, totals, sums, sinks, out, head, first_row, num_tokens * plan.heads, T.int64(0)
        )


@T.inline
def _attend_tiles(plan, num_sequences, q, q_starts, kv_lens, tables, k_pages, v_pages, sinks, out):
    """Any batch: parallel over tiles of every sequence and K/V heads.

    Sequence s owns the tile numbers from q_starts[s] // tokens + s on; some at its end are empty. A contiguous
    part of the parallel loop takes tiles from both ends, because the late tiles of a prompt see more tokens.
    """
    many = T.meta_var(_prefill_tile(plan))
    one = T.meta_var(_tile(plan, 1))
    with T.sblock("attention"):
        T.reads()
        T.writes()
        num_tiles: T.let = T.Cast("int64", q_starts[num_sequences]) // many.tokens + num_sequences
        for item in T.parallel(num_tiles * plan.num_kv_heads):
            with T.sblock("item"):
                T.reads()
                T.writes()
                head: T.let = item // num_tiles
                rank: T.let = item % num_tiles
                number: T.let = T.if_then_else(
                    rank % 2 == 0, rank // 2, num_tiles - 1 - rank // 2
                )
                low = T.sblock_alloc_buffer((1,), "int64", scope="local")
                high = T.sblock_alloc_buffer((1,), "int64", scope="local")
                low[0] = T.int64(0)
                high[0] = num_sequences
                while low[0] + 1 < high[0]:
                    middle: T.let = (low[0] + high[0]) // 2
                    if T.Cast("int64", q_starts[middle]) // many.tokens + middle <= number:
                        low[0] = middle
                    else:
                        high[0] = middle
                seq: T.let = low[0]
                start: T.let = T.Cast("int64", q_starts[seq])
                length: T.let = T.Cast("int64", q_starts[seq + 1]) - start
                first: T.let = (number - start // many.tokens - seq) * many.tokens
                num_tokens: T.let = T.min(T.int64(many.tokens), length - first)
                position: T.let = kv_lens[seq] - T.Cast("int32", length - first)
                if num_tokens == 1:
                    _attend_rows(
                        plan, one, q, tables, k_pages, v_pages, sinks, out, seq, head,
                        start + first, T.int64(1), position,
                    )
                if num_tokens > 1:
                    _attend_rows(
                        plan, many, q, tables, k_pages, v_pages, sinks, out, seq, head,
                        start + first, num_tokens, position,
                    )


@T.inline
def _merge_parts(plan, num_parts, tile, row, highest, totals, sums):
    """Adds the other parts' rows (`tile.rows` apart) to the first part's row."""
    for part in range(1, num_parts):
        with T.sblock("part"):
            T.reads()
            T.writes()
            other: T.let = row + part * tile.rows
            weights = T.sblock_alloc_buffer((2,), "float32", scope="local")
            maximum = T.sblock_alloc_buffer((1,), "float32", scope="local")
            maximum[0] = T.max(highest[row], highest[other])
            weights[0] = exp(highest[row] - maximum[0])
            weights[1] = exp(highest[other] - maximum[0])
            highest[row] = maximum[0]
            for c in range(plan.page_lanes):
                totals[row, c] = totals[row, c] * weights[0] + totals[other, c] * weights[1]
            for d in range(plan.v_head_dim):
                sums[row, d] = sums[row, d] * weights[0] + sums[other, d] * weights[1]


@T.inline
def _attend_one_token(
    plan, num_sequences, q, q_starts, kv_lens, tables, k_pages, v_pages, sinks, out
):
    """One token: parallel over K/V heads and parts of the context, then the parts are merged."""
    tile = T.meta_var(_tile(plan, 1))
    parts = T.meta_var(plan.tuning.decode_splits)
    with T.sblock("attention"):
        T.reads()
        T.writes()
        rows = T.meta_var(plan.num_kv_heads * parts * tile.rows)
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
        begin: T.let = _first_seen_page(plan, position)
        end: T.let = T.Cast("int64", position) // plan.page_size + 1
        if end - begin <= plan.serial_pages:
            num_parts[0] = T.int64(1)
            for head in range(plan.num_kv_heads):
                with T.sblock("head"):
                    T.reads()
                    T.writes()
                    _attend_pages(
                        plan, tile, q, tables, k_pages, v_pages, seq, head, T.int64(0), T.int64(1), position,
                        begin, end, head * parts * tile.rows, highest, totals, sums,
                    )
        else:
            num_parts[0] = T.int64(parts)
            share: T.let = (end - begin + (parts - 1)) // parts
            for item in T.parallel(plan.num_kv_heads * parts):
                with T.sblock("item"):
                    T.reads()
                    T.writes()
                    first: T.let = T.min(begin + item % parts * share, end)
                    _attend_pages(
                        plan, tile, q, tables, k_pages, v_pages, seq, item // parts, T.int64(0), T.int64(1),
                        position, first, T.min(first + share, end),
                        item * tile.rows, highest, totals, sums,
                    )
        for head in range(plan.num_kv_heads):
            for r in range(plan.heads):
                with T.sblock("merge"):
                    T.reads()
                    T.writes()
                    _merge_parts(plan, num_parts[0], tile, head * parts * tile.rows + r, highest, totals, sums)
            _write_rows(
                plan, highest, totals, sums, sinks, out, head, T.int64(0), T.int64(plan.heads),
                head * parts * tile.rows,
            )
