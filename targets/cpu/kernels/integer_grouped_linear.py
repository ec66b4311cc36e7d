"""The experts' product of a mixture-of-experts layer in integers (see grouped_linear.py).

Buffers in order: codes `[1, R, K]` int8, scales `[1, R, K / block]` f32, sums `[1, R, K / unit]`
int32, R being T or T · top_k, expert_ids `[T, top_k]` i32, the arrays of `packed_parts(fmt, m, k,
num_experts=X)`, bias `[X, M]` f32 where asked, y `[T · top_k, M]` f32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.expert_choices import group_choices
from llmc.targets.cpu.kernels.integer import (
    CodedRows,
    integer_panels,
    unit_of,
    unpacked_chunks,
)
from llmc.targets.cpu.kernels.panels import Rows, WeightPanels
from llmc.targets.cpu.kernels.register_tiles import Turn, cover_column, store_tile
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.layout import ceildiv
from llmc.targets.cpu.parameters import IntegerParameters

Expr = Any


def integer_grouped_linear(
    fmt: WeightFormat,
    num_experts: int,
    m: int,
    k: int,
    top_k: int,
    *,
    per_token_input: bool,
    block: int,
    bias: bool,
    params: IntegerParameters,
) -> tvm.tirx.PrimFunc:
    """The product with `num_experts` matrices `[m, k]` for any number of tokens.

    Tasks are columns of panels of the chosen experts, in the order in which they lie in memory.
    Ids have to be in 0 … num_experts - 1: they are not checked here. Raises CompileError where the
    format cannot hold k features.
    """
    params = params.of(fmt)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("integer_grouped_linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            tokens = size_var("num_tokens")
            choices = tokens * i64(top_k)
            x_rows = tokens if per_token_input else choices
            codes = argument("codes", (1, x_rows, k), "int8")
            scales = argument("scales", (1, x_rows, k // block))
            sums = argument("sums", (1, x_rows, k // unit_of(fmt, block)), "int32")
            expert_ids = argument("expert_ids", (tokens, top_k), "int32")
            weights = WeightPanels.arguments(fmt, m, k, num_experts, table=params.table)
            biases = [argument("bias", (num_experts, m))] if bias else []
            y = argument("y", (choices, m))
            groups = group_choices(expert_ids, tokens, top_k, num_experts)
            coded = CodedRows(codes, scales, sums, block)

            def choice(position: Expr) -> Expr:
                return T.Cast("int64", groups.order[position])

            def x_row(position: Expr) -> Expr:
                row = choice(position)
                return T.floordiv(row, i64(top_k)) if per_token_input else row

            product = Product(
                weights=weights,
                x=Rows(codes),
                y=Rows(y, batched=False),
                x_row=x_row,
                y_row=choice,
                start=(lambda expert, row, index: biases[0][expert, index]) if bias else None,
            )

            def multiply(
                expert: Expr,
                panels: list[Expr],
                positions: list[Expr],
                turn: Turn | None,
                following: Expr | None,
            ) -> list[list[Expr]]:
                rows = [T.Bind(x_row(position)) for position in positions]
                return integer_panels(weights, expert, panels, coded, rows, params, turn, following)

            def store(
                expert: Expr,
                _place: int,
                panels: list[Expr],
                positions: list[Expr],
                totals: list[list[Expr]],
            ) -> None:
                outputs = [T.Bind(choice(position)) for position in positions]
                store_tile(product, panels, outputs, totals, expert)

            width = min((params.chunked or params.tiling).panels, weights.panels)
            columns = i64(ceildiv(weights.panels, width))
            with params.dot.scope(), T.parallel(groups.num_active * columns) as task:
                expert, first, count = groups.of(T.floordiv(task, columns))
                chunks = None
                if params.chunked is not None:
                    chunks = unpacked_chunks(weights, expert, coded, params, x_row)
                cover_column(
                    weights,
                    T.Bind(T.floormod(task, columns)),
                    width,
                    first,
                    count,
                    params.tiling,
                    partial(multiply, expert),
                    partial(store, expert),
                    chunks,
                )
    return builder.get()
