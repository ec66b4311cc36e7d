"""Which tokens of a row top-k and top-p leave, and which of them is drawn, on any kind of device.

A token's *distance* is (largest logit - logit) / temperature, its weight exp(-distance). Ordered by
distance, equal ones by id, the tokens that stay are the first ones: top_k of them, or as few as
make up the share top_p of all weight (of what top_k leaves, where both are asked for). The search
is a radix selection: the bits of a distance are an integer in its order, its *key*; a histogram of
the key's first digit over the row tells which bin the last token is in, the next pass looks into
that bin alone. It ends when a bin stays as a whole or has one key. No row is sorted, and all sums
are made in an order that depends on nothing but the size of the vocabulary.

State of a row between passes, int32 `[INTEGERS]`: LOW, the first key searched; SHIFT, the place of
the digit, negative at the end; COUNT of the tokens below LOW; BY_SHARE, 0 while top_k is searched;
LIMIT and TIES, the result: keys below LIMIT stay, and the first TIES tokens at it. Float32
`[FLOATS]`: BELOW, the weight below LOW; KEPT, that of all that stays, negative while unknown.

The functions here run while an IRBuilder frame is open, as those of building.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import (
    f32,
    i64,
    lanes_of,
    put,
    registers,
    splat_like,
    to_f32,
    vector_type,
    when,
)

Expr = Any
LOW, SHIFT, COUNT, BY_SHARE, LIMIT, TIES = range(6)
BELOW, KEPT = range(2)
INTEGERS, FLOATS = 6, 2
# Columns of a row's settings, float32 `[R, 5]`.
SCALE, TOP_P, MAX_DISTANCE, PART_SHARE, PLACE_SHARE = range(5)
SETTINGS = 5

FARTHEST = 127.0
"""Distances end here: exp(-127) is 0 in float32."""
_KEY_SCALE = 1 / 64  # FARTHEST / 64 is below 2, whose bits are 2^30
KEY_BITS = 30
ALL = 1 << KEY_BITS


def distance(value: Expr, largest: Expr, scale: Expr) -> Expr:
    """(largest - value) · scale, up to FARTHEST; -inf has that. Numbers or vectors, as below."""
    return T.min((largest - value) * scale, splat_like(largest, FARTHEST))


def key_of(distant: Expr) -> Expr:
    """A distance's key: 0 … 2^30 - 1."""
    scaled = distant * splat_like(distant, _KEY_SCALE)
    return T.reinterpret(vector_type("int32", lanes_of(distant)), scaled)


def distance_of(key: Expr) -> Expr:
    """The distance that has this key."""
    return T.reinterpret("float32", key) * f32(1 / _KEY_SCALE)


def initial_state(
    token_id: Expr, top_k: Expr, top_p: Expr, vocab_size: int, digit_bits: int
) -> tuple[list[Expr], list[Expr]]:
    """Integers and floats; a row whose token is chosen, or that is not limited, has nothing to
    search.
    """
    chosen = T.Or(token_id < T.int32(0), top_k == T.int32(1))
    by_count = T.And(top_k > T.int32(0), top_k < T.int32(vocab_size))
    nothing = T.Or(chosen, T.Not(T.Or(by_count, top_p < f32(1))))
    shift = T.Select(nothing, T.int32(-1), T.int32(KEY_BITS - digit_bits))
    by_share = T.Select(by_count, T.int32(0), T.int32(1))
    integers = [T.int32(0), shift, T.int32(0), by_share, T.int32(ALL), T.int32(0)]
    return integers, [f32(0), f32(-1)]


class Search:
    """One thread's work on a row's histogram of keys by digits of `digit_bits`."""

    def __init__(
        self,
        *,
        digit_bits: int,
        integers: list[Expr],
        floats: list[Expr],
        top_k: Expr,
        top_p: Expr,
        counts: Expr,
        weights: Expr,
    ) -> None:
        self.digit_bits = digit_bits
        self.integers, self.floats = integers, floats
        self.top_k, self.top_p = top_k, top_p
        self.counts, self.weights = counts, weights
        self.by_share = integers[BY_SHARE] == T.int32(1)
        # The bin of the last token, and the tokens and the weight before that bin.
        self.bin = registers((1,), "int32")
        self.before = registers((1,), "int32")
        self.weight_before = registers((1,))

    def narrow(
        self, put_integer: Callable[[int, Expr], None], put_float: Callable[[int, Expr], None]
    ) -> None:
        """Takes the bin that the last token to stay is in, and ends the search where that is
        enough: `put(place, value)` writes what changes of the state.
        """
        zero = i64(0)
        total = self._total()
        wanted = T.Bind(self.top_p * total)
        self._find(wanted)
        bin_ = T.Bind(self.bin[zero])
        before, weight_before = T.Bind(self.before[zero]), T.Bind(self.weight_before[zero])
        count = T.Bind(self.counts[T.Cast("int64", bin_)])
        weight = T.Bind(self.weights[T.Cast("int64", bin_)])
        each = T.Bind(weight / to_f32(count))
        missing = T.Bind(self.top_k - before)
        share = T.ceil((wanted - weight_before) / T.max(each, f32(1e-37)))
        share = T.Cast("int32", T.min(T.max(share, f32(1)), to_f32(count)))
        ties = T.Bind(T.Select(self.by_share, share, missing))

        shift = self.integers[SHIFT]
        fits = T.And(T.Not(self.by_share), missing >= count)
        whole = T.Bind(T.Cast("int32", T.Or(count == T.int32(1), fits))) == T.int32(1)
        first = T.Bind(self.integers[LOW] + T.shift_left(bin_, shift))
        limit = T.Bind(T.Select(whole, first + T.shift_left(T.int32(1), shift), first))
        ties = T.Bind(T.Select(whole, T.int32(0), ties))
        kept = T.Select(whole, weight_before + weight, weight_before + to_f32(ties) * each)
        with T.If(T.Or(whole, shift == T.int32(0))):
            with T.Then():
                # Rounding must not let top_p keep what top_k did not.
                fewer = T.And(limit == self.integers[LIMIT], ties < self.integers[TIES])
                with when(T.Or(limit < self.integers[LIMIT], fewer)):
                    put_integer(LIMIT, limit)
                    put_integer(TIES, ties)
                again = T.And(T.Not(self.by_share), self.top_p < f32(1))
                put_integer(LOW, T.int32(0))
                put_integer(
                    SHIFT, T.Select(again, T.int32(KEY_BITS - self.digit_bits), T.int32(-1))
                )
                put_integer(COUNT, T.int32(0))
                put_integer(BY_SHARE, T.int32(1))
                put_float(BELOW, f32(0))
                put_float(KEPT, kept)
            with T.Else():
                put_integer(LOW, first)
                put_integer(SHIFT, shift - T.int32(self.digit_bits))
                put_integer(COUNT, before)
                put_float(BELOW, weight_before)
                put_float(KEPT, T.Select(self.by_share, total, f32(-1)))

    def _total(self) -> Expr:
        """The weight that top_p is a share of: what top_k left, else the row's, known at first."""
        summed = registers((1,))
        put(summed, f32(0), 0)
        with T.serial(i64(1 << self.digit_bits)) as bin_:
            put(summed, summed[i64(0)] + self.weights[bin_], 0)
        known = self.floats[KEPT]
        return T.Bind(T.Select(known < f32(0), summed[i64(0)], known))

    def _find(self, wanted: Expr) -> None:
        """The first bin with which enough is kept, else (by rounding) the last with a token."""
        zero = i64(0)
        count, weight = registers((1,), "int32"), registers((1,))
        put(count, self.integers[COUNT], 0)
        put(weight, self.floats[BELOW], 0)
        put(self.bin, T.int32(0), 0)
        enough = registers((1,), "int32")
        put(enough, T.int32(0), 0)
        with T.serial(i64(1 << self.digit_bits)) as bin_:
            own = T.Bind(self.counts[bin_])
            with when(T.And(enough[zero] == T.int32(0), own > T.int32(0))):
                put(self.bin, T.Cast("int32", bin_), 0)
                put(self.before, count[zero], 0)
                put(self.weight_before, weight[zero], 0)
                put(count, count[zero] + own, 0)
                put(weight, weight[zero] + self.weights[bin_], 0)
                reached = T.Select(self.by_share, weight[zero] >= wanted, count[zero] >= self.top_k)
                put(enough, T.Cast("int32", reached), 0)


class Pick:
    """One of `count` places, as likely as its weight and that of its ties that are left."""

    def __init__(self, tie_weight: Expr, count: int, num_ties: Expr) -> None:
        """`num_ties` of the tokens at the limit are left, each of `tie_weight`."""
        self._tie_weight, self._count, self._num_ties = tie_weight, count, num_ties
        self.index = registers((1,), "int32")
        self.ties_left = registers((1,), "int32")  # where the place begins
        self._sum, self._below = registers((1,)), registers((1,))
        self._point = registers((1,))

    def pick(self, at: Callable[[Expr], tuple[Expr, Expr]], share: Expr) -> None:
        """Finds where `share` of the whole weight is reached, a place with a weight; `at(i)` is
        the place's (weight, number of ties).
        """
        zero = i64(0)
        left = registers((1,), "int32")
        self._walk(at, left, lambda i, before: None)
        put(self._point, share * self._sum[zero], 0)
        reached = registers((1,), "int32")
        put(reached, T.int32(0), 0)
        put(self.index, T.int32(0), 0)
        put(self._below, f32(0), 0)
        put(self.ties_left, self._num_ties, 0)

        def look(i: Expr, before: Expr) -> None:
            below, ties = before
            weighs = self._sum[zero] > below
            with when(T.And(reached[zero] == T.int32(0), weighs)):
                put(self.index, T.Cast("int32", i), 0)
                put(self._below, below, 0)
                put(self.ties_left, ties, 0)
                put(reached, T.Cast("int32", self._sum[zero] > self._point[zero]), 0)
                put(self._above, self._sum[zero], 0)

        self._above = registers((1,))
        put(self._above, f32(1), 0)
        self._walk(at, left, look)

    def share(self) -> Expr:
        """How far into the place's own weight the point is, in [0, 1]."""
        zero = i64(0)
        below = T.Bind(self._below[zero])
        return (self._point[zero] - below) / (self._above[zero] - below)

    def _walk(
        self,
        at: Callable[[Expr], tuple[Expr, Expr]],
        left: Expr,
        look: Callable[[Expr, tuple[Expr, Expr]], None],
    ) -> None:
        zero = i64(0)
        put(left, self._num_ties, 0)
        put(self._sum, f32(0), 0)
        with T.serial(i64(self._count)) as i:
            weight, ties = at(i)
            before = registers((1,))
            ties_before = registers((1,), "int32")
            put(before, self._sum[zero], 0)
            put(ties_before, left[zero], 0)
            taken = T.Bind(T.min(ties, left[zero]))
            put(left, left[zero] - taken, 0)
            mass = weight + to_f32(taken) * self._tie_weight
            put(self._sum, self._sum[zero] + mass, 0)
            look(i, (before[zero], ties_before[zero]))
