"""Rows of a packed matrix by id: the token embedding, also where the LM head shares the weights."""

from __future__ import annotations

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, kernel, put, when
from llmc.targets.gpu.kernels.block import launch, rows_of, strided
from llmc.targets.gpu.kernels.weights import Weights, panel_lane
from llmc.targets.gpu.parameters import GpuParameters


def embedding(
    fmt: WeightFormat, v: int, e: int, *, tokens: int | None, dtype: str, params: GpuParameters
) -> PrimFunc:
    """Buffers ids `[1, T]` i32, the arrays of `packed_parts(fmt, v, e)`, y `[1, T, E]` of `dtype`.

    Ids have to be in 0 … v - 1: they are not checked here. But -1, which stands for no token where
    a step takes what the one before chose, is read as 0. Raises CompileError where the format
    cannot hold e features.
    """
    with kernel("embedding") as built:
        rows = rows_of(tokens)
        ids = argument("ids", (1, rows), "int32")
        weights = Weights.arguments(fmt, v, e)
        y = argument("y", (1, rows, e), dtype)
        with (
            launch((rows,), (params.row_threads(e),)) as (token, thread),
            strided(thread, weights.chunks, params.row_threads(e)) as chunk,
        ):
            panel, lane = panel_lane(T.Bind(T.max(T.Cast("int64", ids[i64(0), token]), i64(0))))
            loaded = weights.chunk(None, T.Bind(panel), chunk, T.Bind(lane))
            start = T.Bind(chunk * i64(weights.features))
            for feature, value in enumerate(loaded.values()):
                column = start + i64(feature)
                if feature < (e - 1) % weights.features + 1:
                    put(y, value, 0, token, column)
                else:
                    with when(column < i64(e)):
                        put(y, value, 0, token, column)
    return built.func
