"""Draws a token of each row: finds which may be drawn, then a block of them, then the place in it.

Two uniform numbers of the sequence's own stream decide, so that a row's token depends on nothing
but the row: one thread does all of it. Most logits of a row are too far from the largest to matter,
and whole blocks of them are passed over by their keys.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import (
    argument,
    f32,
    i64,
    kernel,
    lanes_of,
    put,
    registers,
    size_var,
    splat_like,
    to_f32,
    when,
)
from llmc.targets.cpu.kernels.logits import (
    Carried,
    LogitsRow,
    LogitsVector,
    bits_of,
    integers,
    lowest,
)
from llmc.targets.cpu.kernels.math import exp, fold_integers, lane_max, lane_sum
from llmc.targets.cpu.kernels.panels import for_each_row, scratch
from llmc.targets.cpu.kernels.vector import at, spread
from llmc.targets.cpu.layout import ceildiv
from llmc.targets.cpu.parameters import SamplingParameters
from llmc.targets.token_search import (
    ALL,
    BY_SHARE,
    FARTHEST,
    FLOATS,
    INTEGERS,
    KEPT,
    KEY_BITS,
    LIMIT,
    LOW,
    MAX_DISTANCE,
    PART_SHARE,
    PLACE_SHARE,
    SCALE,
    SETTINGS,
    SHIFT,
    TIES,
    TOP_P,
    Pick,
    Search,
    distance,
    distance_of,
    initial_state,
    key_of,
)

Expr = Any
_DIGIT_BITS = 10
_BINS = 1 << _DIGIT_BITS
_FIRST_SHIFT = KEY_BITS - _DIGIT_BITS
_NUM_PASSES = 2 * KEY_BITS // _DIGIT_BITS  # enough for top_k, then top_p
_HISTOGRAMS = 2  # in turns: an addition has not to wait for the one before
_LN_2 = 0.6931472
_ONE = 127  # the exponent that float32 gives to 1


def draw(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """Buffers logits `[L, V]` f32, rows, token_ids and top_k `[R]` i32, settings `[R, 5]` f32, then
    drawn `[R]` i32: what is chosen already, or drawn now.
    """
    with kernel("draw") as built:
        rows = size_var("num_rows")
        logits = argument("logits", (size_var("num_logits"), vocab_size))
        wanted = argument("rows", (rows,), "int32")
        token_ids = argument("token_ids", (rows,), "int32")
        top_k = argument("top_k", (rows,), "int32")
        settings = argument("settings", (rows, SETTINGS))
        drawn = argument("drawn", (rows,), "int32")

        def one_row(row: Expr) -> None:
            token_id = T.Bind(token_ids[row])
            put(drawn, token_id, row)
            with when(T.And(token_id >= T.int32(0), top_k[row] != T.int32(1))):
                tokens = _Tokens(
                    LogitsRow(logits, T.Bind(T.Cast("int64", wanted[row]))),
                    params.block,
                    token_id,
                    [T.Bind(settings[row, i64(column)]) for column in range(SETTINGS)],
                )
                limit, ties = _Limits(tokens, token_id, T.Bind(top_k[row])).find()
                put(drawn, _Draw(tokens, limit, ties).token(), row)

        for_each_row(rows, vocab_size, one_row)
    return built.func


class _Tokens:
    """A row's tokens, in blocks."""

    def __init__(
        self,
        logits: LogitsRow,
        block: int,
        best: Expr,
        settings: list[Expr],
    ) -> None:
        self.logits, self.block, self.settings = logits, block, settings
        self.vocab_size, self.width = logits.vocab_size, logits.width
        self.blocks = ceildiv(self.vocab_size, block)
        self.largest = T.Bind(logits.buffer[logits.source, T.Cast("int64", best)])

    def vectors(self, block: Expr) -> Any:  # noqa: ANN401 - a context manager
        """A loop over the vectors of a block."""
        return self.logits.vectors(block * i64(self.block), self.block)

    def distance(self, value: Expr) -> Expr:
        """From the largest, of logits; a number or a vector."""
        lanes = lanes_of(value)
        scale = spread(self.settings[SCALE], lanes)
        return T.Bind(distance(value, spread(self.largest, lanes), scale))

    def is_new(self, vector: LogitsVector) -> Expr:
        """Which of a vector's columns the one before did not have."""
        return vector.columns >= spread(T.Cast("int32", vector.begin), self.width)


class _Limits:
    """The search for the last token that top-k and top-p leave."""

    def __init__(self, tokens: _Tokens, best: Expr, top_k: Expr) -> None:
        self.tokens, self.top_k, self.top_p = tokens, top_k, tokens.settings[TOP_P]
        self.integers, self.floats = registers((INTEGERS,), "int32"), registers((FLOATS,))
        self.last = registers((1,), "int32")  # digits above are of no interest in the next pass
        state = initial_state(best, top_k, self.top_p, tokens.vocab_size, _DIGIT_BITS)
        for buffer, values in zip((self.integers, self.floats), state, strict=True):
            for place, value in enumerate(values):
                put(buffer, value, place)
        self.counts, self.weights = scratch((_BINS,), "int32"), scratch((_BINS,))
        # The last bin takes what is of no interest: a choice would be guessed wrong too often.
        self.own_counts = scratch((_HISTOGRAMS, _BINS + 1), "int32")
        self.own_weights = scratch((_HISTOGRAMS, _BINS + 1), "float64")
        self.digits, self.far = scratch((tokens.block,), "int32"), scratch((tokens.block,))

    def find(self) -> tuple[Expr, Expr]:
        """(first key that does not stay, number of tokens at it that do)."""
        with when(self._shift() >= T.int32(0)):
            with T.If(self.integers[i64(BY_SHARE)] == T.int32(0)):
                with T.Then():
                    self._bound_by_count()
                with T.Else():
                    self._bound_by_share()
        with T.serial(i64(_NUM_PASSES)), when(self._shift() >= T.int32(0)):
            self._fill_histogram()
            search = Search(
                digit_bits=_DIGIT_BITS,
                integers=[T.Bind(self.integers[i64(p)]) for p in range(INTEGERS)],
                floats=[T.Bind(self.floats[i64(p)]) for p in range(FLOATS)],
                top_k=self.top_k,
                top_p=self.top_p,
                counts=self.counts,
                weights=self.weights,
            )
            search.narrow(
                lambda place, value: put(self.integers, value, place),
                lambda place, value: put(self.floats, value, place),
            )
            # The search for top_p begins anew, among what top_k left.
            left = T.min(T.shift_right(self.integers[i64(LIMIT)], T.int32(_FIRST_SHIFT)), _last())
            put(self.last, T.Select(self._shift() == T.int32(_FIRST_SHIFT), left, _last()), 0)
        return T.Bind(self.integers[i64(LIMIT)]), T.Bind(self.integers[i64(TIES)])

    def _shift(self) -> Expr:
        return self.integers[i64(SHIFT)]

    def _bound_by_count(self) -> None:
        """With top_k blocks' largest tokens, there are top_k tokens."""
        tokens = self.tokens
        with T.serial(i64(_BINS)) as bin_:
            put(self.counts, T.int32(0), bin_)
        with T.serial(i64(tokens.blocks)) as block:
            largest = Carried.of(lowest(tokens.width))
            with tokens.vectors(block) as vector:
                largest.set(T.max(largest.get(), vector.value))
            best = Carried.of(lane_max(largest.get())).get()
            digit = T.Bind(self._first_digit(tokens.distance(best)))
            at_digit = T.Cast("int64", digit)
            put(self.counts, self.counts[at_digit] + T.int32(1), at_digit)
        seen = registers((1,), "int32")
        put(seen, T.int32(0), 0)
        put(self.last, _last(), 0)
        with T.serial(i64(_BINS)) as bin_:
            with when(seen[i64(0)] < self.top_k):
                put(self.last, bin_, 0)
            put(seen, seen[i64(0)] + self.counts[bin_], 0)
        with when(seen[i64(0)] < self.top_k):
            put(self.last, _last(), 0)

    def _bound_by_share(self) -> None:
        """Tokens of weights so small that all together could not make up what top_p leaves out."""
        tokens, total = self.tokens, registers((1,), "float64")
        put(total, T.float64(0), 0)
        with T.serial(i64(tokens.blocks)) as block:
            weight = Carried.of(spread(f32(0), tokens.width))
            with tokens.vectors(block) as vector:
                nothing = splat_like(vector.value, 0.0)
                value = _weight(tokens.distance(vector.value))
                weight.set(weight.get() + T.Select(tokens.is_new(vector), value, nothing))
            of_block = Carried.of(lane_sum(weight.get())).get()
            put(total, total[i64(0)] + T.Cast("float64", of_block), 0)
        all_ = T.Bind(to_f32(total[i64(0)]))
        put(self.floats, all_, KEPT)
        left_out = T.max(all_ * (f32(1) - self.top_p), f32(1e-30))
        ratio = T.Bind(f32(float(tokens.vocab_size)) / left_out)
        # Its logarithm, or up to ln 2 more.
        exponent = T.shift_right(bits_of(ratio), T.int32(23)) - T.int32(_ONE - 1)
        farthest = T.max(to_f32(exponent) * f32(_LN_2), f32(0))
        put(self.last, self._first_digit(T.min(farthest, f32(FARTHEST))), 0)

    def _first_digit(self, distant: Expr) -> Expr:
        return T.shift_right(key_of(distant), T.int32(_FIRST_SHIFT))

    def _fill_histogram(self) -> None:
        """Counts and weights of the digits of this pass."""
        tokens, width = self.tokens, self.tokens.width
        with T.serial(i64(_BINS)) as bin_:
            for own in range(_HISTOGRAMS):
                put(self.own_counts, T.int32(0), own, bin_)
                put(self.own_weights, T.float64(0), own, bin_)
        shift, low = T.Bind(self._shift()), T.Bind(self.integers[i64(LOW)])
        last = T.Bind(self.last[i64(0)])
        with T.serial(i64(tokens.blocks)) as block:
            found = Carried.of(integers(_BINS, width))
            with T.serial(i64(tokens.block)) as place:
                put(self.digits, T.int32(_BINS), place)
            with tokens.vectors(block) as vector:
                far = tokens.distance(vector.value)
                offset = T.Bind(key_of(far) - spread(low, width))
                digit = T.Bind(T.shift_right(offset, spread(shift, width)))  # negative as offset is
                inside = T.And(digit >= integers(0, width), digit <= spread(last, width))
                inside = T.And(inside, tokens.is_new(vector))
                digit = T.Bind(T.Select(inside, digit, integers(_BINS, width)))
                found.set(T.min(found.get(), digit))
                place = [at(vector.number * i64(width), width)]
                T.buffer_store(self.digits, digit, place)
                T.buffer_store(self.far, far, place)
            with when(fold_integers("smin", found.get()) < T.int32(_BINS)):
                self._add_block()
        with T.serial(i64(_BINS)) as bin_:
            every = range(_HISTOGRAMS)
            put(self.counts, sum((self.own_counts[i64(h), bin_] for h in every), T.int32(0)), bin_)
            weight = sum((self.own_weights[i64(h), bin_] for h in every), T.float64(0))
            put(self.weights, to_f32(weight), bin_)

    def _add_block(self) -> None:
        """Adds a block's tokens, whose digits and distances are known."""
        width, block = self.tokens.width, self.tokens.block
        with T.serial(i64(block // width)) as number:
            place = at(number * i64(width), width)
            far = T.Bind(self.far[place])
            T.buffer_store(self.far, _weight(far), [place])
        with T.serial(i64(block // _HISTOGRAMS)) as number:
            for own in range(_HISTOGRAMS):
                place = T.Bind(number * i64(_HISTOGRAMS) + i64(own))
                digit = T.Bind(T.Cast("int64", self.digits[place]))
                put(self.own_counts, self.own_counts[i64(own), digit] + T.int32(1), own, digit)
                weight = T.Cast("float64", self.far[place])
                put(self.own_weights, self.own_weights[i64(own), digit] + weight, own, digit)


class _Draw:
    """One of the tokens with keys below `limit`, or of the first `num_ties` at it."""

    def __init__(self, tokens: _Tokens, limit: Expr, num_ties: Expr) -> None:
        self.tokens, self.limit, self.num_ties = tokens, limit, num_ties
        self.farthest = tokens.settings[MAX_DISTANCE]
        at_limit = T.Bind(distance_of(limit))
        weight = _weight(at_limit)
        self.tie_weight = T.Bind(T.Select(at_limit <= self.farthest, weight, f32(0)))

    def token(self) -> Expr:
        """Its id."""
        tokens, width = self.tokens, self.tokens.width
        weights, ties = scratch((tokens.blocks,)), scratch((tokens.blocks,), "int32")
        with T.serial(i64(tokens.blocks)) as block:
            put(weights, f32(0), block)
            put(ties, T.int32(0), block)
            with when(self._has_tokens(block)):
                weight = Carried.of(spread(f32(0), width))
                tie = Carried.of(integers(0, width))
                with tokens.vectors(block) as vector:
                    of_vector = self._of_vector(vector)
                    weight.set(weight.get() + of_vector[0])
                    tie.set(tie.get() + of_vector[1])
                put(weights, Carried.of(lane_sum(weight.get())).get(), block)
                put(ties, fold_integers("add", tie.get()), block)
        picked = Pick(self.tie_weight, tokens.blocks, self.num_ties)
        picked.pick(lambda i: (weights[i], ties[i]), tokens.settings[PART_SHARE])
        block = T.Bind(T.Cast("int64", picked.index[i64(0)]))

        own_weights, own_ties = scratch((tokens.block,)), scratch((tokens.block,), "int32")
        with T.serial(i64(tokens.block)) as place:
            put(own_weights, f32(0), place)
            put(own_ties, T.int32(0), place)
        with tokens.vectors(block) as vector:
            own = at(vector.number * i64(width), width)
            for buffer, value in zip((own_weights, own_ties), self._of_vector(vector), strict=True):
                T.buffer_store(buffer, value, [own])
        placed = Pick(self.tie_weight, tokens.block, T.Bind(picked.ties_left[i64(0)]))
        placed.pick(lambda i: (own_weights[i], own_ties[i]), tokens.settings[PLACE_SHARE])
        place = T.Bind(T.Cast("int64", placed.index[i64(0)]))
        lane = T.Bind(T.floormod(place, i64(width)))
        start = T.min(block * i64(tokens.block) + place - lane, i64(tokens.vocab_size - width))
        return T.Cast("int32", start + lane)

    def _has_tokens(self, block: Expr) -> Expr:
        """Whether some of a block may be drawn, as far as keys tell."""
        width, nearest = self.tokens.width, Carried.of(integers(0, self.tokens.width))
        with when(self.limit < T.int32(ALL)):
            nearest.set(integers(ALL, width))
            with self.tokens.vectors(block) as vector:
                keys = key_of(self.tokens.distance(vector.value))
                nearest.set(T.min(nearest.get(), keys))
        return fold_integers("smin", nearest.get()) <= self.limit

    def _of_vector(self, vector: LogitsVector) -> tuple[Expr, Expr]:
        """(weights, 0), (0, 1) for tokens at the limit, or (0, 0)."""
        tokens, width = self.tokens, self.tokens.width
        far = tokens.distance(vector.value)
        keys = T.Bind(key_of(far))
        new, limit = tokens.is_new(vector), spread(self.limit, width)
        stays = T.And(T.And(new, keys < limit), far <= spread(self.farthest, width))
        nothing = splat_like(far, 0.0)
        weights = T.Select(stays, _weight(far), nothing)
        at_limit = T.And(new, T.And(keys <= limit, keys >= limit))
        return T.Bind(weights), T.Bind(T.Select(at_limit, integers(1, width), integers(0, width)))


def _weight(far: Expr) -> Expr:
    """exp(-far), in a register: TVM puts values in place of bindings' names, and what a Let names
    inside one may stand in a function only once.
    """
    return Carried.of(exp(splat_like(far, 0.0) - far)).get()


def _last() -> Expr:
    return T.int32(_BINS - 1)
