"""Activations as signed bytes: a scale for each block of features, and what the codes add up to."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.outputs import Quantized, for_each_block
from llmc.targets.cpu.kernels.panels import for_each_row, lanes
from llmc.targets.cpu.layout import PANEL

Expr = Any


def quantize_activations(
    *, features: int, block: int, unit: int, factor: int, tokens: int | None = None
) -> PrimFunc:
    """Rounds x `[1, T, K]` f32 to what `Quantized` says; buffers x, codes, scales, sums.

    `tokens` is T where it is fixed.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("quantize_activations")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            count = size_var("num_tokens") if tokens is None else i64(tokens)
            x = argument("x", (1, count, features))
            output = Quantized.arguments(count, features, block=block, unit=unit, factor=factor)

            def one_row(row: Expr) -> None:
                def store(first: Expr, count: int) -> None:
                    starts = [first * i64(block) + i64(v) for v in range(0, count * block, PANEL)]
                    output.store(row, first, [x[i64(0), row, lanes(start)] for start in starts])

                for_each_block(output, features // block, store)

            for_each_row(count, features, one_row)
    return builder.get()
