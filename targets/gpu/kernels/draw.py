"""Draws a token of each row: its part of the row first, then its place there.

Which tokens may be drawn is what kernels/token_limits.py found, and min_p as the largest distance.
Two uniform numbers of the sequence's own stream decide, so that a row's token depends on nothing
but the row.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import argument, f32, i64, kernel, put, registers, size_var, to_f32, when
from llmc.targets.gpu.kernels.block import add, launch, reduce_all, shared, strided, sync, when_all
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.gpu.parameters import Features, SamplingParameters
from llmc.targets.token_search import (
    INTEGERS,
    LIMIT,
    MAX_DISTANCE,
    PART_SHARE,
    PLACE_SHARE,
    SCALE,
    SETTINGS,
    TIES,
    Pick,
    distance,
    distance_of,
    key_of,
)

Expr = Any


def draw_parts(vocab_size: int, params: SamplingParameters, features: Features) -> PrimFunc:
    """Buffers logits `[L, V]` f32, rows, token_ids and top_k `[R]` i32, settings `[R, 5]` f32,
    integers `[R, 6]` i32, weights and ties `[R, parts]` f32.

    weights are those of each part's tokens before the limit, ties the number of tokens at it. Rows
    whose token is chosen get neither.
    """
    parts, threads = ceildiv(vocab_size, params.part), params.draw_threads
    with kernel("draw_parts") as built:
        rows = size_var("num_rows")
        arguments = _arguments(rows, vocab_size)
        weights = argument("weights", (rows, parts))
        ties = argument("ties", (rows, parts))
        with launch((parts, rows), (threads,)) as (part, row, thread):
            with when_all(arguments.is_open(row)):
                tokens = _Row(arguments, row)
                tokens.begin()
                with strided(thread, params.part, threads) as place:
                    tokens.add(T.Bind(part * i64(params.part) + place), vocab_size)
                own = [tokens.weight[i64(0)], to_f32(tokens.ties[i64(0)])]
                weight, count = reduce_all(own, add, thread, threads, features)
                with when(thread == i64(0)):
                    put(weights, weight, row, part)
                    put(ties, count, row, part)
    return built.func


def draw(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """The arguments of `draw_parts`, then drawn `[R]` i32: what is chosen already, or drawn now."""
    parts, threads = ceildiv(vocab_size, params.part), params.draw_threads
    places = params.part // threads
    with kernel("draw") as built:
        rows = size_var("num_rows")
        arguments = _arguments(rows, vocab_size)
        weights = argument("weights", (rows, parts))
        ties = argument("ties", (rows, parts))
        drawn = argument("drawn", (rows,), "int32")
        with launch((rows,), (threads,)) as (row, thread):
            with when(thread == i64(0)):
                put(drawn, arguments.token_ids[row], row)
            with when_all(arguments.is_open(row)):
                tokens = _Row(arguments, row)
                part_weights, part_ties = shared((parts,)), shared((parts,), "int32")
                with strided(thread, parts, threads) as part:
                    put(part_weights, weights[row, part], part)
                    put(part_ties, T.Cast("int32", ties[row, part]), part)
                sync()
                # Which part, then whose places in it, and how many ties are left there.
                found, place_of = shared((2,), "int32"), shared((2,), "int32")
                share = shared((1,))
                with when(thread == i64(0)):
                    picked = Pick(tokens.tie_weight, parts, tokens.num_ties)
                    picked.pick(
                        lambda i: (part_weights[i], part_ties[i]),
                        tokens.setting(PART_SHARE),
                    )
                    put(found, picked.index[i64(0)], 0)
                    put(found, picked.ties_left[i64(0)], 1)
                sync()
                part = T.Bind(T.Cast("int64", found[i64(0)]))
                left = T.Bind(found[i64(1)])
                begin = T.Bind(part * i64(params.part) + thread * i64(places))
                thread_weights, thread_ties = shared((threads,)), shared((threads,), "int32")
                tokens.begin()
                with T.serial(i64(places)) as place:
                    tokens.add(T.Bind(begin + place), vocab_size)
                put(thread_weights, tokens.weight[i64(0)], thread)
                put(thread_ties, tokens.ties[i64(0)], thread)
                sync()
                with when(thread == i64(0)):
                    picked = Pick(tokens.tie_weight, threads, left)
                    picked.pick(
                        lambda i: (thread_weights[i], thread_ties[i]),
                        tokens.setting(PLACE_SHARE),
                    )
                    put(place_of, picked.index[i64(0)], 0)
                    put(place_of, picked.ties_left[i64(0)], 1)
                    put(share, picked.share(), 0)
                sync()
                owner = T.Bind(T.Cast("int64", place_of[i64(0)]))
                left = T.Bind(place_of[i64(1)])
                rest = T.Bind(share[i64(0)])
                with when(owner == thread):
                    picked = Pick(tokens.tie_weight, places, left)
                    picked.pick(
                        lambda i: tokens.of_token(T.Bind(begin + i), vocab_size),
                        rest,
                    )
                    put(drawn, T.Cast("int32", begin) + picked.index[i64(0)], row)
    return built.func


class _Arguments:
    """What both kernels get first."""

    def __init__(
        self,
        logits: Expr,
        wanted: Expr,
        token_ids: Expr,
        top_k: Expr,
        settings: Expr,
        integers: Expr,
    ) -> None:
        self.logits, self.wanted, self.token_ids = logits, wanted, token_ids
        self.top_k, self.settings, self.integers = top_k, settings, integers

    def is_open(self, row: Expr) -> Expr:
        """Whether the row's token is still to be drawn."""
        return T.And(self.token_ids[row] >= T.int32(0), self.top_k[row] != T.int32(1))


def _arguments(rows: Expr, vocab_size: int) -> _Arguments:
    return _Arguments(
        logits=argument("logits", (size_var("num_logits"), vocab_size)),
        wanted=argument("rows", (rows,), "int32"),
        token_ids=argument("token_ids", (rows,), "int32"),
        top_k=argument("top_k", (rows,), "int32"),
        settings=argument("settings", (rows, SETTINGS)),
        integers=argument("integers", (rows, INTEGERS), "int32"),
    )


class _Row:
    """The tokens of one row that may be drawn, and a thread's sums over some of them."""

    def __init__(self, arguments: _Arguments, row: Expr) -> None:
        self._arguments, self._row = arguments, row
        self.source = T.Bind(T.Cast("int64", arguments.wanted[row]))
        best = T.Cast("int64", arguments.token_ids[row])
        self.largest = T.Bind(arguments.logits[self.source, best])
        self.scale = T.Bind(self.setting(SCALE))
        self.farthest = T.Bind(self.setting(MAX_DISTANCE))
        self.limit = T.Bind(arguments.integers[row, i64(LIMIT)])
        self.num_ties = T.Bind(arguments.integers[row, i64(TIES)])
        at_limit = T.Bind(distance_of(self.limit))
        near = at_limit <= self.farthest
        self.tie_weight = T.Bind(T.Select(near, T.exp(-at_limit), f32(0)))
        self.weight, self.ties = registers((1,)), registers((1,), "int32")

    def setting(self, column: int) -> Expr:
        """One of the row's settings."""
        return self._arguments.settings[self._row, i64(column)]

    def of_token(self, column: Expr, vocab_size: int) -> tuple[Expr, Expr]:
        """(weight, 0), (0, 1) for one at the limit, or (0, 0)."""
        inside = column < i64(vocab_size)
        # No row is read beyond its end; its last logit stands in.
        place = T.Select(inside, column, i64(vocab_size - 1))
        value = T.Bind(self._arguments.logits[self.source, place])
        far = T.Bind(distance(value, self.largest, self.scale))
        key = T.Bind(key_of(far))
        stays = T.And(T.And(inside, key < self.limit), far <= self.farthest)
        weight = T.Select(stays, T.exp(-far), f32(0))
        tie = T.Cast("int32", T.And(inside, key == self.limit))
        return T.Bind(weight), T.Bind(tie)

    def begin(self) -> None:
        """Empties the sums."""
        put(self.weight, f32(0), 0)
        put(self.ties, T.int32(0), 0)

    def add(self, column: Expr, vocab_size: int) -> None:
        """Adds a token to the sums."""
        weight, tie = self.of_token(column, vocab_size)
        put(self.weight, self.weight[i64(0)] + weight, 0)
        put(self.ties, self.ties[i64(0)] + tie, 0)
