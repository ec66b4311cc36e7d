"""RMSNorm and LayerNorm for CPUs: a row is read once from memory, then again out of the cache.

RMSNorm: Zhang and Sennrich, 2019: y = x / sqrt(mean(x²) + eps) · (weight + offset). LayerNorm: Ba
et al., 2016, with the variance taken around the mean (two passes over a cached row), not as a
difference of squares.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder, tirx
from tvm.tirx import Buffer, Expr, PrimFunc

from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels import panels
from llmc.targets.cpu.kernels.math import lane_sum
from llmc.targets.cpu.kernels.outputs import Output, for_each_block
from llmc.targets.cpu.kernels.panels import get, put, splat
from llmc.targets.cpu.kernels.vector import at, for_rows, lanes_of, registers, spread
from llmc.targets.cpu.layout import PANEL

CHAINS = 4  # independent sums, to hide the latency of an addition


def rms_norm(
    *,
    features: int,
    eps: float,
    weight_offset: float = 0.0,
    heads: int | None = None,
    tokens: int | None = None,
) -> PrimFunc:
    """RMSNorm over the last axis; buffers x, weight `[features]`, y, all f32.

    x and y are `[1, T, features]`, or `[1, T, heads, features]` with `heads` (a norm of each head).
    The weight is used as weight + weight_offset. `tokens` is T where it is fixed.
    """

    @T.prim_func(s_tir=True)
    def rms_norm(x_h: T.handle, weight_h: T.handle, y_h: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t = T.int64()
        x = T.match_buffer(x_h, _shape(t, tokens, heads, features), "float32")
        weight = T.match_buffer(weight_h, (features,), "float32")
        y = T.match_buffer(y_h, _shape(t, tokens, heads, features), "float32")

        @T.inline
        def normalize(row):
            _rms_row(x, weight, y, row, features, eps, weight_offset)

        for_rows(_num_rows(t, tokens, heads), features, normalize)

    return rms_norm


def narrow_rms_norm(
    *,
    features: int,
    eps: float,
    weight_offset: float,
    output: Callable[[Expr], Output],
    tokens: int | None = None,
) -> PrimFunc:
    """RMSNorm of rows that goes on narrow; buffers x `[1, T, features]`, weight `[features]`, both
    f32, and what `output(T)` declares.

    features is a multiple of 16. `tokens` is T where it is fixed.
    """
    vectors = features // PANEL
    chains = CHAINS if vectors % CHAINS == 0 else 1
    with IRBuilder() as builder:
        with tirx.prim_func(s_tir=True):
            tirx.func_name("narrow_rms_norm")
            tirx.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = size_var("num_tokens") if tokens is None else i64(tokens)
            x = argument("x", (1, count, features))
            weight = argument("weight", (features,))
            out = output(count)

            def normalize(row: Expr) -> None:
                sums = panels.registers(chains)
                for c in range(chains):
                    put(sums, c, splat(0.0))
                with tirx.serial(i64(vectors // chains)) as step:
                    for c in range(chains):
                        start = (step * i64(chains) + i64(c)) * i64(PANEL)
                        value = tirx.Bind(x[i64(0), row, panels.lanes(start)])
                        put(sums, c, get(sums, c) + value * value)
                total = registers(1)
                tirx.buffer_store(total, tirx.float32(0), [0])
                for c in range(chains):
                    tirx.buffer_store(total, total[0] + lane_sum(get(sums, c)), [0])
                mean = total[0] * tirx.float32(1 / features)
                scale = tirx.Bind(tirx.float32(1) / tirx.sqrt(mean + tirx.float32(eps)))

                def store(first: Expr, blocks: int) -> None:
                    values = []
                    for v in range(0, blocks * out.block, PANEL):
                        at = panels.lanes(first * i64(out.block) + i64(v))
                        factor = weight[at] + splat(weight_offset)
                        values.append(x[i64(0), row, at] * tirx.broadcast(scale, PANEL) * factor)
                    out.store(row, first, values)

                for_each_block(out, features // out.block, store)

            panels.for_each_row(count, features, normalize)
    return builder.get()


def add_rms_norm(
    *, features: int, eps: float, weight_offset: float = 0.0, tokens: int | None = None
) -> PrimFunc:
    """Residual addition and RMSNorm; buffers x, residual, weight `[features]`, sum, y, all f32.

    x, residual, sum = x + residual and y are `[1, T, features]`.
    """

    @T.prim_func(s_tir=True)
    def add_rms_norm(
        x_h: T.handle, residual_h: T.handle, weight_h: T.handle, sum_h: T.handle, y_h: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t = T.int64()
        x = T.match_buffer(x_h, _shape(t, tokens, None, features), "float32")
        residual = T.match_buffer(residual_h, _shape(t, tokens, None, features), "float32")
        weight = T.match_buffer(weight_h, (features,), "float32")
        total = T.match_buffer(sum_h, _shape(t, tokens, None, features), "float32")
        y = T.match_buffer(y_h, _shape(t, tokens, None, features), "float32")
        lanes = T.meta_var(lanes_of(features))

        @T.inline
        def normalize(row):
            for c in range(features // lanes):
                total[0, row, at(c * lanes, lanes)] = (
                    x[0, row, at(c * lanes, lanes)] + residual[0, row, at(c * lanes, lanes)]
                )
            _rms_row(total, weight, y, row, features, eps, weight_offset)

        for_rows(_num_rows(t, tokens, None), features, normalize)

    return add_rms_norm


def layer_norm(
    *, features: int, eps: float, bias: bool = True, tokens: int | None = None
) -> PrimFunc:
    """LayerNorm over the last axis; buffers x, weight, bias (only with `bias`), y, all f32.

    x and y are `[1, T, features]`, weight and bias `[features]`.
    """

    @T.inline
    def body(x, weight, shift, y, num_rows):
        lanes = T.meta_var(lanes_of(features))

        @T.inline
        def normalize(row):
            acc = registers(CHAINS * lanes)
            mean = registers(1)
            scale = registers(1)
            _mean(mean, acc, x, row, features, T.float32(0), False)
            _mean(scale, acc, x, row, features, mean[0], True)
            scale[0] = T.float32(1) / T.sqrt(scale[0] + T.float32(eps))
            for c in range(features // lanes):
                centred: T.let = x[0, row, at(c * lanes, lanes)] - spread(mean[0], lanes)
                scaled: T.let = centred * spread(scale[0], lanes) * weight[at(c * lanes, lanes)]
                y[0, row, at(c * lanes, lanes)] = (
                    scaled if shift is None else scaled + shift[at(c * lanes, lanes)]
                )

        for_rows(num_rows, features, normalize)

    if bias:

        @T.prim_func(s_tir=True)
        def layer_norm_bias(x_h: T.handle, weight_h: T.handle, bias_h: T.handle, y_h: T.handle):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            t = T.int64()
            x = T.match_buffer(x_h, _shape(t, tokens, None, features), "float32")
            weight = T.match_buffer(weight_h, (features,), "float32")
            shift = T.match_buffer(bias_h, (features,), "float32")
            y = T.match_buffer(y_h, _shape(t, tokens, None, features), "float32")
            body(x, weight, shift, y, _num_rows(t, tokens, None))

        return layer_norm_bias

    @T.prim_func(s_tir=True)
    def layer_norm(x_h: T.handle, weight_h: T.handle, y_h: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t = T.int64()
        x = T.match_buffer(x_h, _shape(t, tokens, None, features), "float32")
        weight = T.match_buffer(weight_h, (features,), "float32")
        y = T.match_buffer(y_h, _shape(t, tokens, None, features), "float32")
        body(x, weight, None, y, _num_rows(t, tokens, None))

    return layer_norm


def _shape(
    symbol: Expr, tokens: int | None, heads: int | None, features: int
) -> tuple[Expr | int, ...]:
    rows = symbol if tokens is None else tokens
    return (1, rows, features) if heads is None else (1, rows, heads, features)


def _num_rows(symbol: Expr, tokens: int | None, heads: int | None) -> Expr | int:
    return (symbol if tokens is None else tokens) * (heads or 1)


def _index(buffer: Buffer, row: Expr, feature: Expr) -> list[Expr | int]:
    """Where a row's feature is, with and without a heads axis."""
    shape = buffer.ty.shape
    return [0, row, feature] if len(shape) == 3 else [0, row // shape[2], row % shape[2], feature]


def _load(buffer: Buffer, row: Expr, feature: Expr) -> Expr:
    return buffer[tuple(_index(buffer, row, feature))]


@T.inline
def _mean(result, acc, x, row, features, centre, squared):
    """result[0] = mean of a row's (x - centre), or of its square."""
    lanes = T.meta_var(lanes_of(features))
    chains = T.meta_var(CHAINS if features // lanes % CHAINS == 0 else 1)
    for c in T.unroll(chains):
        acc[at(c * lanes, lanes)] = spread(T.float32(0), lanes)
    for block in range(features // (lanes * chains)):
        for c in T.unroll(chains):
            value: T.let = _load(x, row, at((block * chains + c) * lanes, lanes)) - spread(
                centre, lanes
            )
            acc[at(c * lanes, lanes)] = acc[at(c * lanes, lanes)] + (
                value * value if squared else value
            )
    result[0] = T.float32(0)
    for c in T.unroll(chains):
        result[0] = result[0] + lane_sum(acc[at(c * lanes, lanes)])
    result[0] = result[0] * T.float32(1 / features)


@T.inline
def _rms_row(x, weight, y, row, features, eps, weight_offset):
    """Normalizes one row of x into y."""
    lanes = T.meta_var(lanes_of(features))
    acc = registers(CHAINS * lanes)
    scale = registers(1)
    _mean(scale, acc, x, row, features, T.float32(0), True)
    scale[0] = T.float32(1) / T.sqrt(scale[0] + T.float32(eps))
    for c in range(features // lanes):
        factor: T.let = weight[at(c * lanes, lanes)] + spread(T.float32(weight_offset), lanes)
        T.buffer_store(
            y,
            _load(x, row, at(c * lanes, lanes)) * spread(scale[0], lanes) * factor,
            _index(y, row, at(c * lanes, lanes)),
        )
