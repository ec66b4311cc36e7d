"""Attention of one tile: a few new tokens of one sequence, for one K/V head.

The algorithm is FlashAttention's online softmax in float32 (Dao et al., 2022) over blocks of pages.
All query heads that share the K/V head make the tile's rows (token-major), so that each vector of K
and V is loaded once for all of them. K pages are transposed: scores have tokens across the lanes.
V pages are not: outputs have features across the lanes.

Masked scores are -inf and the running maximum starts at a finite number: a block of which a row
sees nothing adds exp(-inf) = 0. V is never read past the last token a tile sees, so stale pages
cannot put a NaN in.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import Buffer, Expr

from llmc.targets.cpu.kernels.math import exp, lane_max, lane_sum, tanh
from llmc.targets.cpu.kernels.vector import at, convert, lanes_of, registers, spread

LOWEST = -3.0e38  # below every score, and finite: LOWEST - LOWEST is 0, not NaN
KV_BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTuning:
    """Sizes that fit the machine; the defaults suit 32 vector registers of 512 bits.

    12 accumulators are best where there are 16 registers of 256 bits (AVX2).
    """

    accumulators: int = 16  # vectors of 16 float32 kept in registers by one inner loop
    tile_rows: int = 48  # most query rows (tokens times heads of a group) of a tile
    block_tokens: int = 128  # K/V tokens between two rescalings
    decode_splits: int = 4  # parts of the context that one-token kernels work on in parallel
    serial_bytes: int = 262_144  # K/V of a layer that one thread reads sooner than others wake up


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that is known of an attention layer at compile time."""

    num_kv_heads: int
    heads: int  # query heads of one K/V head
    head_dim: int
    v_head_dim: int
    page_size: int
    kv_dtype: str
    scale: float
    window: int | None
    softcap: float | None
    group: int
    tuning: AttentionTuning

    @property
    def page_lanes(self) -> int:
        """Lanes of scores: they divide a page."""
        return lanes_of(self.page_size)

    @property
    def value_lanes(self) -> int:
        """Lanes of outputs: they divide a value."""
        return lanes_of(self.v_head_dim)

    @property
    def block_pages(self) -> int:
        """Pages between two rescalings."""
        return max(1, self.tuning.block_tokens // self.page_size)

    @property
    def serial_pages(self) -> int:
        """Longest context of a one-token kernel that one thread walks."""
        features = self.num_kv_heads * (self.head_dim + self.v_head_dim)
        return self.tuning.serial_bytes // (features * self.page_size * KV_BYTES[self.kv_dtype])

    @property
    def query_scale(self) -> float:
        """Queries are scaled once; a softcap works on scores in units of itself."""
        return self.scale if self.softcap is None else self.scale / self.softcap

    def tile(self, tokens: int) -> Tile:
        """A tile of `tokens` tokens in strips of equal height."""
        rows = tokens * self.heads
        num_strips = -(-rows // max(1, self.tuning.accumulators // 2))
        return Tile(tokens=tokens, strip=-(-rows // num_strips), num_strips=num_strips)

    def prefill_tile(self) -> Tile:
        """The tile with the fewest padded rows; the larger one among equals."""
        most = max(1, self.tuning.tile_rows // self.heads)
        tiles = [self.tile(tokens) for tokens in range(max(1, most // 2), most + 1)]
        return min(tiles, key=lambda t: (t.rows / (t.tokens * self.heads), -t.tokens))

    def vectors_at_once(self, tile: Tile, num_vectors: int) -> int:
        """The largest divisor of num_vectors whose accumulators fit in registers."""
        fitting = max(1, self.tuning.accumulators // tile.strip)
        return max(n for n in range(1, min(fitting, num_vectors) + 1) if num_vectors % n == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows of a tile (tokens times heads, padded) walked `strip` rows at once in registers."""

    tokens: int
    strip: int
    num_strips: int

    @property
    def rows(self) -> int:
        """Rows with padding."""
        return self.strip * self.num_strips


@dataclass(frozen=True, slots=True)
class Pages:
    """One sequence's K and V, for one head."""

    tables: Buffer  # [G, S, B] i32
    k: Buffer  # [P, Kv, D, N]
    v: Buffer  # [P, Kv, N, Dv]
    seq: Expr
    head: Expr


@dataclass(frozen=True, slots=True)
class Running:
    """Online softmax of a tile's rows, which begin at row `base` of the buffers."""

    highest: Buffer  # [rows] f32, maximum of the scores so far
    totals: Buffer  # [rows, page_lanes] f32, lane sums of exp(score - highest)
    sums: Buffer  # [rows, Dv] f32, the same weights times V
    base: Expr


def first_seen_page(plan: Plan, position: Expr) -> Expr:
    """The first page (int64) of a sequence that a query at `position` (int32) sees."""
    if plan.window is None:
        return T.int64(0)
    first = T.max(position - T.int32(plan.window - 1), T.int32(0))
    return T.Cast("int64", first) // plan.page_size


def _page(plan: Plan, pages: Pages, number: Expr) -> Expr:
    return T.Cast("int64", pages.tables[plan.group, pages.seq, number])


def _visible(plan: Plan, score: Expr, token: Expr, position: Expr) -> Expr:
    """-inf where a query at `position` does not see `token…`, the tokens of the score's lanes."""
    lanes = plan.page_lanes
    index = T.ramp(T.int32(0), T.int32(1), lanes)
    hidden = T.broadcast(-T.infinity("float32"), lanes)
    score = T.Select(index <= T.broadcast(position - token, lanes), score, hidden)
    if plan.window is not None:
        first = position - token - T.int32(plan.window)
        score = T.Select(index > T.broadcast(first, lanes), score, hidden)
    return score


def _capped(plan: Plan, score: Expr) -> Expr:
    return score if plan.softcap is None else tanh(score) * T.float32(plan.softcap)


@T.inline
def _score_strip(plan, tile, q_tile, scores, pages, first, j, strip, position):
    """Masked q · K of a strip's rows and page first + j, into the block's page j of `scores`."""
    lanes = T.meta_var(plan.page_lanes)
    at_once = T.meta_var(plan.vectors_at_once(tile, plan.page_size // plan.page_lanes))
    page: T.let = _page(plan, pages, first + j)
    top: T.let = strip * tile.strip
    for part in T.unroll(plan.page_size // (lanes * at_once)):
        with T.sblock("score"):
            T.reads()
            T.writes()
            acc = registers(tile.strip * at_once * lanes)
            for a in T.unroll(tile.strip * at_once):
                acc[at(a * lanes, lanes)] = spread(T.float32(0), lanes)
            for d in range(plan.head_dim):
                for c in T.unroll(at_once):
                    column = T.meta_var(at((part * at_once + c) * lanes, lanes))
                    k: T.let = convert(pages.k[page, pages.head, d, column], "float32")
                    for r in T.unroll(tile.strip):
                        a = T.meta_var(at((r * at_once + c) * lanes, lanes))
                        acc[a] = acc[a] + spread(q_tile[top + r, d], lanes) * k
            for r in T.unroll(tile.strip):
                for c in T.unroll(at_once):
                    column = T.meta_var((part * at_once + c) * lanes)
                    scores[top + r, at(j * plan.page_size + column, lanes)] = _visible(
                        plan,
                        _capped(plan, acc[at((r * at_once + c) * lanes, lanes)]),
                        T.Cast("int32", (first + j) * plan.page_size + column),
                        position + T.Cast("int32", (top + r) // plan.heads),
                    )


@T.inline
def _soften_row(plan, scores, corrections, run, r, num_vectors):
    """Turns a row of scores into exp(score - maximum); updates its running maximum and sum."""
    lanes = T.meta_var(plan.page_lanes)
    row = T.meta_var(run.base + r)
    with T.sblock("soften"):
        T.reads()
        T.writes()
        acc = registers(lanes)
        maximum = registers(1)
        acc[at(0, lanes)] = spread(T.float32(LOWEST), lanes)
        for c in range(num_vectors):
            acc[at(0, lanes)] = T.max(acc[at(0, lanes)], scores[r, at(c * lanes, lanes)])
        maximum[0] = T.max(run.highest[row], lane_max(acc[at(0, lanes)]))
        corrections[r] = exp(run.highest[row] - maximum[0])
        run.highest[row] = maximum[0]
        acc[at(0, lanes)] = run.totals[row, at(0, lanes)] * spread(corrections[r], lanes)
        for c in range(num_vectors):
            weight: T.let = exp(scores[r, at(c * lanes, lanes)] - spread(maximum[0], lanes))
            scores[r, at(c * lanes, lanes)] = weight
            acc[at(0, lanes)] = acc[at(0, lanes)] + weight
        run.totals[row, at(0, lanes)] = acc[at(0, lanes)]


@T.inline
def _value_strip(plan, tile, scores, corrections, run, pages, first, num_pages, num_seen, strip):
    """Sums of a strip's rows = sums · correction + weights · V of the block's pages."""
    lanes = T.meta_var(plan.value_lanes)
    at_once = T.meta_var(plan.vectors_at_once(tile, plan.v_head_dim // plan.value_lanes))
    top: T.let = strip * tile.strip
    for part in range(plan.v_head_dim // (lanes * at_once)):
        with T.sblock("value"):
            T.reads()
            T.writes()
            acc = registers(tile.strip * at_once * lanes)
            for r in T.unroll(tile.strip):
                for c in T.unroll(at_once):
                    column = T.meta_var(at((part * at_once + c) * lanes, lanes))
                    acc[at((r * at_once + c) * lanes, lanes)] = run.sums[
                        run.base + top + r, column
                    ] * spread(corrections[top + r], lanes)
            for j in range(num_pages):
                page: T.let = _page(plan, pages, first + j)
                rest: T.let = num_seen - (first + j) * plan.page_size
                for n in range(T.min(T.int64(plan.page_size), rest)):
                    for c in T.unroll(at_once):
                        column = T.meta_var(at((part * at_once + c) * lanes, lanes))
                        v: T.let = convert(pages.v[page, pages.head, n, column], "float32")
                        for r in T.unroll(tile.strip):
                            a = T.meta_var(at((r * at_once + c) * lanes, lanes))
                            acc[a] = acc[a] + v * spread(
                                scores[top + r, j * plan.page_size + n], lanes
                            )
            for r in T.unroll(tile.strip):
                for c in T.unroll(at_once):
                    column = T.meta_var(at((part * at_once + c) * lanes, lanes))
                    run.sums[run.base + top + r, column] = acc[at((r * at_once + c) * lanes, lanes)]


@T.inline
def attend_pages(plan, tile, q, first_row, num_tokens, position, pages, begin, end, run):
    """Softmax of a tile over the pages [begin, end) of its sequence; leaves its state in `run`.

    The tile's queries are rows first_row… of q `[1, T, H, D]`; the first stands at `position`.
    """
    with T.sblock("tile"):
        T.reads()
        T.writes()
        q_tile = T.sblock_alloc_buffer((tile.rows, plan.head_dim), "float32")
        scores = T.sblock_alloc_buffer((tile.rows, plan.block_pages * plan.page_size), "float32")
        corrections = T.sblock_alloc_buffer((tile.rows,), "float32")
        num_rows: T.let = num_tokens * plan.heads
        num_strips: T.let = (num_rows + (tile.strip - 1)) // tile.strip
        num_seen: T.let = T.Cast("int64", position) + num_tokens
        for r in range(num_strips * tile.strip):
            run.highest[run.base + r] = T.float32(LOWEST)
            for c in T.unroll(plan.page_lanes):
                run.totals[run.base + r, c] = T.float32(0)
            for d in range(plan.v_head_dim):
                run.sums[run.base + r, d] = T.float32(0)
            for d in range(plan.head_dim):
                q_tile[r, d] = T.float32(plan.query_scale) * T.if_then_else(
                    r < num_rows,
                    q[0, first_row + r // plan.heads, pages.head * plan.heads + r % plan.heads, d],
                    T.float32(0),
                )
        for block in range((end - begin + (plan.block_pages - 1)) // plan.block_pages):
            first: T.let = begin + block * plan.block_pages
            num_pages: T.let = T.min(T.int64(plan.block_pages), end - first)
            for j in range(num_pages):
                for strip in range(num_strips):
                    _score_strip(plan, tile, q_tile, scores, pages, first, j, strip, position)
            for r in range(num_rows):
                num_vectors: T.let = num_pages * (plan.page_size // plan.page_lanes)
                _soften_row(plan, scores, corrections, run, r, num_vectors)
            for strip in range(num_strips):
                _value_strip(
                    plan, tile, scores, corrections, run, pages, first, num_pages, num_seen, strip
                )


@T.inline
def merge_runs(plan, row, other, run):
    """Adds the state of row `other` to that of `row`: two parts of one context."""
    with T.sblock("merge"):
        T.reads()
        T.writes()
        weights = registers(2)
        maximum = registers(1)
        maximum[0] = T.max(run.highest[row], run.highest[other])
        weights[0] = exp(run.highest[row] - maximum[0])
        weights[1] = exp(run.highest[other] - maximum[0])
        run.highest[row] = maximum[0]
        for c in range(plan.page_lanes):
            run.totals[row, c] = run.totals[row, c] * weights[0] + run.totals[other, c] * weights[1]
        for d in range(plan.v_head_dim):
            run.sums[row, d] = run.sums[row, d] * weights[0] + run.sums[other, d] * weights[1]


@T.inline
def write_rows(plan, run, sinks, out, head, first_row, num_tokens):
    """Outputs of a finished tile: sums / (totals + the sink's weight)."""
    for r in range(num_tokens * plan.heads):
        with T.sblock("finish"):
            T.reads()
            T.writes()
            share = registers(1)
            share[0] = lane_sum(run.totals[run.base + r, at(0, plan.page_lanes)])
            if sinks is not None:
                share[0] = share[0] + exp(
                    sinks[head * plan.heads + r % plan.heads] - run.highest[run.base + r]
                )
            share[0] = T.float32(1) / share[0]
            for d in range(plan.v_head_dim):
                out[0, first_row + r // plan.heads, head * plan.heads + r % plan.heads, d] = (
                    run.sums[run.base + r, d] * share[0]
                )
