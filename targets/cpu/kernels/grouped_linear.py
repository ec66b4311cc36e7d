"""The experts' product of a mixture-of-experts layer: every row goes through the experts chosen for
it.

Buffers in order: x `[T, K]` f32 (each token's row serves its top_k experts) or `[T · top_k, K]` (a
row for each choice), expert_ids `[T, top_k]` i32, the arrays of `packed_parts(fmt, m, k,
num_experts=X)`, bias `[X, M]` f32 where asked, y `[T · top_k, M]` f32; row `t · top_k + j` belongs
to choice `j` of token `t`.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, size_var
from llmc.targets.cpu.kernels.dot import prepare_activations
from llmc.targets.cpu.kernels.expert_choices import Groups, group_choices
from llmc.targets.cpu.kernels.panels import Rows, WeightPanels
from llmc.targets.cpu.kernels.tiles import (
    Product,
    fused_positions,
    multiply_columns,
    num_column_blocks,
)
from llmc.targets.cpu.parameters import LinearParameters

Expr = Any


def grouped_linear(
    fmt: WeightFormat,
    num_experts: int,
    m: int,
    k: int,
    top_k: int,
    *,
    per_token_input: bool,
    bias: bool,
    params: LinearParameters,
) -> tvm.tirx.PrimFunc:
    """The product with `num_experts` matrices `[m, k]` for any number of tokens.

    Only chosen experts' weights are read, each once. Ids have to be in 0 … num_experts - 1: they
    are not checked here. Raises CompileError where the format cannot hold k features.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("grouped_linear")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            tokens = size_var("num_tokens")
            choices = tokens * i64(top_k)
            x_rows = tokens if per_token_input else choices
            x = argument("x", (x_rows, k))
            expert_ids = argument("expert_ids", (tokens, top_k), "int32")
            weights = WeightPanels.arguments(fmt, m, k, num_experts, table=params.table)
            biases = [argument("bias", (num_experts, m))] if bias else []
            y = argument("y", (choices, m))
            groups = group_choices(expert_ids, tokens, top_k, num_experts)

            def choice(position: Expr) -> Expr:
                return T.Cast("int64", groups.order[position])

            def x_row(position: Expr) -> Expr:
                row = choice(position)
                return T.floordiv(row, i64(top_k)) if per_token_input else row

            product = Product(
                weights=weights,
                x=Rows(x, batched=False),
                y=Rows(y, batched=False),
                x_row=x_row,
                y_row=choice,
                start=(lambda expert, row, index: biases[0][expert, index]) if bias else None,
            )
            if params.fused:
                _fused(product, groups, x_rows, params)
            else:
                _blocked(product, groups, params)
    return builder.get()


def _fused(product: Product, groups: Groups, x_rows: Expr, params: LinearParameters) -> None:
    """Tasks are panels of active experts, in the order in which they lie in memory."""
    weights = product.weights
    panels = i64(weights.panels)
    x = prepare_activations(weights, product.x, x_rows)
    with T.parallel(groups.num_active * panels) as task:
        expert, first, count = groups.of(T.floordiv(task, panels))
        panel = T.Bind(T.floormod(task, panels))
        fused_positions(product, x, expert, panel, first, count, params)


def _blocked(product: Product, groups: Groups, params: LinearParameters) -> None:
    """Tasks are column blocks of active experts, columns outermost, so that a large expert is
    shared by all.
    """
    active = T.Bind(groups.num_active)
    divisor = T.Bind(T.max(active, i64(1)))
    with T.parallel(i64(num_column_blocks(product.weights, params)) * active) as task:
        expert, first, count = groups.of(T.floormod(task, divisor))
        multiply_columns(product, expert, T.floordiv(task, divisor), first, count, params)
