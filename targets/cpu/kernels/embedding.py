"""Rows of a panel-packed matrix by id: the token embedding, also where the LM head shares the
weights.

Buffers in order: ids `[1, T]` i32, the arrays of `packed_parts(fmt, v, e)`, y `[1, T, E]` f32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.panels import WeightPanels, decode
from llmc.targets.cpu.layout import stored_zero_point

Expr = Any

SERIAL_TOKENS = 8
"""Up to so many rows are copied on the calling thread: waking the others takes longer."""


def embedding(fmt: WeightFormat, v: int, e: int) -> tvm.tirx.PrimFunc:
    """Gathers and dequantizes rows of a matrix `[v, e]` for any number of ids.

    Ids have to be in 0 … v - 1: they are not checked here. Raises CompileError where the format
    cannot hold e features.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("embedding")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = size_var("num_tokens")
            ids = argument("ids", (1, count), "int32")
            weights = WeightPanels.arguments(fmt, v, e)
            y = argument("y", (1, count, e))

            def rows(loop: Callable[[Expr], Any]) -> None:
                with loop(count) as token:
                    row = T.Bind(T.Cast("int64", ids[i64(0), token]))
                    _copy_row(weights, row, y, token)

            with T.If(count <= i64(SERIAL_TOKENS)):
                with T.Then():
                    rows(T.serial)
                with T.Else():
                    rows(T.parallel)
    return builder.get()


def _copy_row(weights: WeightPanels, row: Expr, y: Expr, token: Expr) -> None:
    fmt, width, per_group = weights.fmt, weights.width, weights.words_per_group

    def copy_word(word: Expr, count: int, scale: Expr | None, minimum: Expr | None) -> None:
        bits = T.Bind(weights.scalar_word(i64(0), row, word))
        for code in decode(fmt, bits, 1):
            if code.offset >= count:
                continue
            value = code.value
            if scale is not None:
                zero = T.float32(float(stored_zero_point(fmt)))
                value = (value * T.float32(2.0**-code.exponent) - zero) * scale
            if minimum is not None:
                value = value + minimum
            T.buffer_store(y, value, [i64(0), token, word * i64(width) + i64(code.offset)])

    with T.serial(i64(weights.groups)) as group:
        scale = None if fmt.is_float else T.Bind(weights.scalar_scale(i64(0), row, group))
        minimum = T.Bind(weights.scalar_minimum(i64(0), row, group)) if fmt.has_min else None
        full = per_group if weights.groups > 1 else weights.k // width
        with T.serial(i64(full)) as w:
            copy_word(T.Bind(group * i64(per_group) + w), width, scale, minimum)
        if weights.k % width:
            copy_word(i64(full), weights.k % width, scale, minimum)
