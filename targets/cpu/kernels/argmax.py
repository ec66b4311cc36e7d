"""The likeliest token of each row of logits: parts of a row in parallel, then what they found."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import argument, i64, kernel, put, registers, size_var, when
from llmc.targets.cpu.kernels.logits import (
    Carried,
    LogitsRow,
    bits_of,
    integers,
    lowest,
)
from llmc.targets.cpu.kernels.math import fold_integers, lane_max
from llmc.targets.cpu.kernels.panels import for_each_row, scratch
from llmc.targets.cpu.kernels.vector import spread
from llmc.targets.cpu.layout import ceildiv
from llmc.targets.cpu.parameters import SamplingParameters

Expr = Any
_INFINITY = 0x7F800000  # the bits of an infinite float32; those of NaN are above
_MAGNITUDE = 0x7FFFFFFF  # all bits but the sign


def argmax(vocab_size: int, params: SamplingParameters) -> PrimFunc:
    """Buffers logits `[L, V]` f32, rows `[R]` i32 (of the logits), token_ids `[R]` i32.

    Of equal logits the first; -1 where a row has a NaN or its largest logit is infinite.
    """
    parts = ceildiv(vocab_size, params.part)
    with kernel("argmax") as built:
        rows = size_var("num_rows")
        logits = argument("logits", (size_var("num_logits"), vocab_size))
        wanted = argument("rows", (rows,), "int32")
        token_ids = argument("token_ids", (rows,), "int32")
        largest = scratch((rows, parts))
        magnitudes = scratch((rows, parts), "int32")

        def row_of(number: Expr) -> LogitsRow:
            return LogitsRow(logits, T.Bind(T.Cast("int64", wanted[number])))

        def one_part(number: Expr) -> None:
            row = T.Bind(T.floordiv(number, i64(parts)))
            part = T.Bind(T.floormod(number, i64(parts)))
            of_row = row_of(row)
            width = of_row.width
            best = Carried.of(lowest(width))
            magnitude = Carried.of(integers(0, width))
            with of_row.vectors(part * i64(params.part), params.part) as vector:
                bits = T.bitwise_and(bits_of(vector.value), integers(_MAGNITUDE, width))
                best.set(T.max(best.get(), vector.value))
                magnitude.set(T.max(magnitude.get(), bits))
            put(largest, lane_max(best.get()), row, part)
            put(magnitudes, fold_integers("smax", magnitude.get()), row, part)

        def one_row(row: Expr) -> None:
            best, magnitude = registers((1,)), registers((1,), "int32")
            best_part = registers((1,), "int64")
            put(best, largest[row, i64(0)], 0)
            put(magnitude, magnitudes[row, i64(0)], 0)
            put(best_part, i64(0), 0)
            with T.serial(i64(parts)) as part:
                put(magnitude, T.max(magnitude[i64(0)], magnitudes[row, part]), 0)
                with when(largest[row, part] > best[i64(0)]):
                    put(best, largest[row, part], 0)
                    put(best_part, part, 0)
            value = T.Bind(best[i64(0)])
            finite = T.bitwise_and(bits_of(value), T.int32(_MAGNITUDE)) < T.int32(_INFINITY)
            put(token_ids, T.int32(-1), row)
            with when(T.And(finite, magnitude[i64(0)] <= T.int32(_INFINITY))):
                of_row = row_of(row)
                width = of_row.width
                first = Carried.of(integers(vocab_size, width))
                begin = best_part[i64(0)] * i64(params.part)
                with of_row.vectors(begin, params.part) as vector:
                    column = T.min(first.get(), vector.columns)
                    here = tirx.EQ(vector.value, spread(value, width))
                    first.set(T.Select(here, column, first.get()))
                put(token_ids, fold_integers("smin", first.get()), row)

        for_each_row(rows * i64(parts), params.part, one_part)
        for_each_row(rows, params.part, one_row)
    return built.func
