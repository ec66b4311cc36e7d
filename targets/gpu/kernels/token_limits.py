"""Which tokens of a row top-k and top-p leave: the search of targets/token_search.py.

A launch makes the histograms of all parts of a row, another one brings them together and narrows
the search.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import argument, f32, i64, kernel, put, registers, size_var, to_f32, when
from llmc.targets.gpu.kernels.block import launch, shared, strided, sync, when_all
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.gpu.parameters import SamplingParameters
from llmc.targets.token_search import (
    FLOATS,
    INTEGERS,
    KEY_BITS,
    LOW,
    SCALE,
    SETTINGS,
    SHIFT,
    TOP_P,
    Search,
    distance,
    initial_state,
    key_of,
)

Expr = Any
DIGIT_BITS = 6
BINS = 1 << DIGIT_BITS
NUM_PASSES = 2 * KEY_BITS // DIGIT_BITS
"""Enough for top_k, then top_p."""


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
                state = initial_state(
                    T.Bind(token_ids[row]),
                    T.Bind(top_k[row]),
                    T.Bind(settings[row, i64(TOP_P)]),
                    vocab_size,
                    DIGIT_BITS,
                )
                for buffer, values in zip((integers, floats), state, strict=True):
                    for place, value in enumerate(values):
                        put(buffer, value, row, place)
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
                    search = Search(
                        digit_bits=DIGIT_BITS,
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
