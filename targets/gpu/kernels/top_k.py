"""The k largest entries of short rows (the experts of a token), by repeated selection."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import argument, i64, kernel, put, registers, to_f32, when
from llmc.targets.gpu.kernels.block import launch, rows_of
from llmc.targets.gpu.parameters import GpuParameters

Expr = Any


def top_k(
    *, columns: int, k: int, tokens: int | None, dtype: str, params: GpuParameters
) -> PrimFunc:
    """Buffers x `[T, columns]`, values `[T, k]`, both of `dtype`, and indices `[T, k]` i32.

    Entries come in descending order, equal ones in the order of their columns. A thread has a row
    and needs columns · k steps for it: rows are router scores.
    """
    threads = params.row_threads(columns)
    with kernel("top_k") as built:
        rows = rows_of(tokens)
        x = argument("x", (rows, columns), dtype)
        values = argument("values", (rows, k), dtype)
        indices = argument("indices", (rows, k), "int32")
        with launch((T.ceildiv(rows, i64(threads)),), (threads,)) as (block, thread):
            row = T.Bind(block * i64(threads) + thread)
            with when(row < rows):
                _select(x, values, indices, row, columns, k)
    return built.func


def _select(x: Expr, values: Expr, indices: Expr, row: Expr, columns: int, k: int) -> None:
    best, index = registers((1,)), registers((1,), "int32")
    last, last_index = registers((1,)), registers((1,), "int32")
    zero = i64(0)
    put(last_index, T.int32(-1), 0)
    put(last, T.float32(0), 0)
    with T.serial(i64(k)) as j:
        put(index, T.int32(-1), 0)
        put(best, T.float32(0), 0)
        with T.serial(i64(columns)) as column:
            value = T.Bind(to_f32(x[row, column]))
            number = T.Bind(T.Cast("int32", column))
            # Below the previous choice, or equal to it and behind it.
            behind = T.And(value == last[zero], number > last_index[zero])
            free = T.Or(last_index[zero] < T.int32(0), T.Or(value < last[zero], behind))
            better = T.Or(index[zero] < T.int32(0), value > best[zero])
            with when(T.And(free, better)):
                put(best, value, 0)
                put(index, number, 0)
        put(last, best[zero], 0)
        put(last_index, index[zero], 0)
        put(values, best[zero], row, j)
        put(indices, index[zero], row, j)
