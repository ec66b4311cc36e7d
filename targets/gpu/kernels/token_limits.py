"""Which tokens of a row top-k and top-p leave: a search for the last of them, digit by digit.

A token's *distance* is (largest logit - logit) / temperature, its weight exp(-distance). Ordered by
distance, equal ones by id, the tokens that stay are the first ones: top_k of them, or as few as
make up the share top_p of all weight (of what top_k leaves, where both are asked for). The search
is a radix selection: the bits of a distance are an integer in its order, its *key*; a histogram of
the key's first digit over the row tells which bin the last token is in, the next pass looks into
that bin alone. It ends when a bin stays as a whole or has one key. No row is sorted, and all sums
are made in an order that depends on nothing but the size of the vocabulary.

State of a row between passes, int32 `[R, 6]`: LOW, the first key searched; SHIFT, the place of the
digit, negative at the end; COUNT of the tokens below LOW; BY_SHARE, 0 while top_k is searched;
LIMIT and TIES, the result: keys below LIMIT stay, and the first TIES tokens at it. Float32
`[R, 2]`: BELOW, the weight below LOW; KEPT, that of all that stays, negative while unknown.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.gpu.kernels.block import (
    argument,
    f32,
    i64,
    kernel,
    launch,
    put,
    registers,
    shared,
    size_var,
    strided,
    sync,
    to_f32,
    when,
    when_all,
)
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.gpu.parameters import SamplingParameters

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
KEY_BITS, DIGIT_BITS = 30, 6
BINS = 1 << DIGIT_BITS
NUM_PASSES = 2 * KEY_BITS // DIGIT_BITS
"""Enough for top_k, then top_p."""
ALL = 1 << KEY_BITS


def distance(value: Expr, largest: Expr, scale: Expr) -> Expr:
    """(largest - value) · scale, up to FARTHEST; -inf has that."""
    return T.min((largest - value) * scale, f32(FARTHEST))


def key_of(distant: Expr) -> Expr:
    """A distance's key: 0 … 2^30 - 1."""
    return T.reinterpret("int32", distant * f32(_KEY_SCALE))


def distance_of(key: Expr) -> Expr:
    """The distance that has this key."""
    return T.reinterpret("float32", key) * f32(1 / _KEY_SCALE)


def limits_begin(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """Buffers token_ids `[R]` i32, top_k `[R]` i32, settings `[R, 5]` f32, then both states.

    A row whose token is already chosen, or that is not limited, has nothing to search.
    """
    threads = params.merge_threads
    with kernel("limits_begin") as built:
        rows = size_var("num_rows")
        token_ids = argument("token_ids", (rows,), "int32")
        top_k = argument("top_k", (rows,), "int32")
        settings = argument("settings", (rows, SETTINGS))
        integers = argument("integers", (rows, INTEGERS), "int32")
        floats = argument("floats", (rows, FLOATS))
        with launch((T.ceildiv(rows, i64(threads)),), (threads,)) as (block, thread):
            row = T.Bind(block * i64(threads) + thread)
            with when(row < rows):
                k = T.Bind(top_k[row])
                chosen = T.Or(token_ids[row] < T.int32(0), k == T.int32(1))
                by_count = T.And(k > T.int32(0), k < T.int32(vocab_size))
                by_share = settings[row, i64(TOP_P)] < f32(1)
                nothing = T.Or(chosen, T.Not(T.Or(by_count, by_share)))
                shift = T.Select(nothing, T.int32(-1), T.int32(KEY_BITS - DIGIT_BITS))
                mode = T.Select(by_count, T.int32(0), T.int32(1))
                for place, value in (
                    (LOW, T.int32(0)),
                    (SHIFT, shift),
                    (COUNT, T.int32(0)),
                    (BY_SHARE, mode),
                    (LIMIT, T.int32(ALL)),
                    (TIES, T.int32(0)),
                ):
                    put(integers, value, row, place)
                put(floats, f32(0), row, BELOW)
                put(floats, f32(-1), row, KEPT)
    return built.func


def limits_histogram(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """Buffers logits `[L, V]` f32, rows and token_ids `[R]` i32, settings `[R, 5]` f32, integers
    `[R, 6]` i32, counts `[R, parts, BINS]` i32 and weights `[R, parts, BINS]` f32.

    Of each part's tokens in each bin. Rows with nothing to search get no histogram.
    """
    parts, threads = ceildiv(vocab_size, params.part), params.histogram_threads
    with kernel("limits_histogram") as built:
        rows = size_var("num_rows")
        logits = argument("logits", (size_var("num_logits"), vocab_size))
        wanted = argument("rows", (rows,), "int32")
        token_ids = argument("token_ids", (rows,), "int32")
        settings = argument("settings", (rows, SETTINGS))
        integers = argument("integers", (rows, INTEGERS), "int32")
        counts = argument("counts", (rows, parts, BINS), "int32")
        weights = argument("weights", (rows, parts, BINS))
        with launch((parts, rows), (threads,)) as (part, row, thread):
            shift = T.Bind(integers[row, i64(SHIFT)])
            with when_all(shift >= T.int32(0)):
                source = T.Bind(T.Cast("int64", wanted[row]))
                largest = T.Bind(logits[source, T.Cast("int64", token_ids[row])])
                scale = T.Bind(settings[row, i64(SCALE)])
                low = T.Bind(integers[row, i64(LOW)])
                own_counts = shared((BINS, threads), "int32")
                own_weights = shared((BINS, threads))
                with T.serial(i64(BINS)) as bin_:
                    put(own_counts, T.int32(0), bin_, thread)
                    put(own_weights, f32(0), bin_, thread)
                with strided(thread, params.part, threads) as place:
                    column = T.Bind(part * i64(params.part) + place)
                    with when(column < i64(vocab_size)):
                        far = T.Bind(distance(logits[source, column], largest, scale))
                        offset = T.Bind(key_of(far) - low)
                        digit = T.Bind(T.shift_right(offset, shift))
                        with when(T.And(offset >= T.int32(0), digit < T.int32(BINS))):
                            at = (T.Bind(T.Cast("int64", digit)), thread)
                            put(own_counts, own_counts[at] + T.int32(1), *at)
                            put(own_weights, own_weights[at] + T.exp(-far), *at)
                sync()
                with strided(thread, BINS, threads) as bin_:
                    count, weight = registers((1,), "int32"), registers((1,))
                    put(count, T.int32(0), 0)
                    put(weight, f32(0), 0)
                    with T.serial(i64(threads)) as turn:
                        # Each begins at a place of its own, so that memory banks differ.
                        other = T.Bind(T.bitwise_and(turn + bin_, i64(threads - 1)))
                        put(count, count[i64(0)] + own_counts[bin_, other], 0)
                        put(weight, weight[i64(0)] + own_weights[bin_, other], 0)
                    put(counts, count[i64(0)], row, part, bin_)
                    put(weights, weight[i64(0)], row, part, bin_)
    return built.func


def limits_narrow(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """Buffers counts, weights, top_k, settings and both states as above, then the new states.

    Takes the bin that the last token to stay is in, and ends the search where that is enough.
    """
    parts = ceildiv(vocab_size, params.part)
    with kernel("limits_narrow") as built:
        rows = size_var("num_rows")
        counts = argument("counts", (rows, parts, BINS), "int32")
        weights = argument("weights", (rows, parts, BINS))
        top_k = argument("top_k", (rows,), "int32")
        settings = argument("settings", (rows, SETTINGS))
        integers = argument("integers", (rows, INTEGERS), "int32")
        floats = argument("floats", (rows, FLOATS))
        new_integers = argument("new_integers", (rows, INTEGERS), "int32")
        new_floats = argument("new_floats", (rows, FLOATS))
        with launch((rows,), (BINS,)) as (row, thread):
            with when(thread == i64(0)):
                for place in range(INTEGERS):
                    put(new_integers, integers[row, i64(place)], row, place)
                for place in range(FLOATS):
                    put(new_floats, floats[row, i64(place)], row, place)
            with when_all(integers[row, i64(SHIFT)] >= T.int32(0)):
                bin_counts, bin_weights = shared((BINS,), "int32"), shared((BINS,))
                count, weight = registers((1,), "int32"), registers((1,))
                put(count, T.int32(0), 0)
                put(weight, f32(0), 0)
                with T.serial(i64(parts)) as part:
                    put(count, count[i64(0)] + counts[row, part, thread], 0)
                    put(weight, weight[i64(0)] + weights[row, part, thread], 0)
                put(bin_counts, count[i64(0)], thread)
                put(bin_weights, weight[i64(0)], thread)
                sync()
                with when(thread == i64(0)):
                    search = _Search(
                        integers=[T.Bind(integers[row, i64(p)]) for p in range(INTEGERS)],
                        floats=[T.Bind(floats[row, i64(p)]) for p in range(FLOATS)],
                        top_k=T.Bind(top_k[row]),
                        top_p=T.Bind(settings[row, i64(TOP_P)]),
                        counts=bin_counts,
                        weights=bin_weights,
                    )
                    search.narrow(
                        lambda place, value: put(new_integers, value, row, place),
                        lambda place, value: put(new_floats, value, row, place),
                    )
    return built.func


class _Search:
    """One thread's work on a row's histogram."""

    def __init__(
        self,
        integers: list[Expr],
        floats: list[Expr],
        top_k: Expr,
        top_p: Expr,
        counts: Expr,
        weights: Expr,
    ) -> None:
        self.integers, self.floats = integers, floats
        self.top_k, self.top_p = top_k, top_p
        self.counts, self.weights = counts, weights
        self.by_share = integers[BY_SHARE] == T.int32(1)
        # The bin of the last token, and the tokens and the weight before that bin.
        self.bin = registers((1,), "int32")
        self.before = registers((1,), "int32")
        self.weight_before = registers((1,))

    def narrow(self, put_integer: Any, put_float: Any) -> None:  # noqa: ANN401 - put(place, value)
        """Writes what changes of the state."""
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
                put_integer(SHIFT, T.Select(again, T.int32(KEY_BITS - DIGIT_BITS), T.int32(-1)))
                put_integer(COUNT, T.int32(0))
                put_integer(BY_SHARE, T.int32(1))
                put_float(BELOW, f32(0))
                put_float(KEPT, kept)
            with T.Else():
                put_integer(LOW, first)
                put_integer(SHIFT, shift - T.int32(DIGIT_BITS))
                put_integer(COUNT, before)
                put_float(BELOW, weight_before)
                put_float(KEPT, T.Select(self.by_share, total, f32(-1)))

    def _total(self) -> Expr:
        """The weight that top_p is a share of: what top_k left, else the row's, known at first."""
        summed = registers((1,))
        put(summed, f32(0), 0)
        with T.serial(i64(BINS)) as bin_:
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
        with T.serial(i64(BINS)) as bin_:
            own = T.Bind(self.counts[bin_])
            with when(T.And(enough[zero] == T.int32(0), own > T.int32(0))):
                put(self.bin, T.Cast("int32", bin_), 0)
                put(self.before, count[zero], 0)
                put(self.weight_before, weight[zero], 0)
                put(count, count[zero] + own, 0)
                put(weight, weight[zero] + self.weights[bin_], 0)
                reached = T.Select(self.by_share, weight[zero] >= wanted, count[zero] >= self.top_k)
                put(enough, T.Cast("int32", reached), 0)
