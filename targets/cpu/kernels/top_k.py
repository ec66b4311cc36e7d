"""The k largest entries of short rows (the experts of a token), by repeated selection."""

from __future__ import annotations

import tvm
from tvm.script import tirx as T


def top_k(*, columns: int, k: int) -> tvm.tirx.PrimFunc:
    """values `[T, k]` f32 and indices `[T, k]` i32 of x `[T, columns]` f32, descending.

    Equal entries come in the order of their columns. Work is columns · k a row: rows are
    router scores.
    """
    lowest = T.float32(-3.4028234663852886e38)

    @T.prim_func(s_tir=True)
    def kernel(x_handle: T.handle, values_handle: T.handle, indices_handle: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        tokens = T.int64()
        x = T.match_buffer(x_handle, (tokens, columns), "float32")
        values = T.match_buffer(values_handle, (tokens, k), "float32")
        indices = T.match_buffer(indices_handle, (tokens, k), "int32")
        for t in T.serial(tokens):
            for j in T.serial(k):
                with T.sblock("select"):
                    T.reads()
                    T.writes()
                    indices[t, j] = -1
                    values[t, j] = lowest
                    for c in T.serial(columns):
                        # Below the previous choice, or equal to it and behind it.
                        previous: T.let = T.max(j - 1, 0)
                        free: T.let = T.Or(
                            j == 0,
                            T.Or(
                                x[t, c] < values[t, previous],
                                T.And(x[t, c] == values[t, previous], c > indices[t, previous]),
                            ),
                        )
                        if T.And(free, T.Or(indices[t, j] < 0, x[t, c] > values[t, j])):
                            values[t, j] = x[t, c]
                            indices[t, j] = T.int32(c)

    return kernel
