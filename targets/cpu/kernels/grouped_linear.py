"""The experts' product of a mixture-of-experts layer: every row goes through the experts chosen for
it.

Buffers in order: x `[T, K]` f32 (each token's row serves its top_k experts) or `[T · top_k, K]` (a
row for each choice), expert_ids `[T, top_k]` i32, the arrays of `packed_parts(fmt, m, k,
num_experts=X)`, bias `[X, M]` f32 where asked, y `[T · top_k, M]` f32; row `t · top_k + j` belongs
to choice `j` of token `t`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.cpu.kernels.dot import prepare_activations
from llmc.targets.cpu.kernels.panels import (
    Rows,
    WeightPanels,
    argument,
    i64,
    scratch,
    size_var,
)
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
            groups = _group_choices(expert_ids, tokens, top_k, num_experts)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """The choices sorted by expert; all int32.

    order `[T · top_k]`: choices, an expert's together; expert e's end where starts `[X + 1]` of e +
    1 says; active `[X]`: the experts that were chosen at all, `num_active` of them.
    """

    order: Expr
    starts: Expr
    active: Expr
    num_active: Expr

    def of(self, index: Expr) -> tuple[Expr, Expr, Expr]:
        """Active expert number `index`, its first position and its number of positions."""
        expert = T.Bind(T.Cast("int64", self.active[index]))
        first = T.Bind(T.Cast("int64", self.starts[expert]))
        count = T.Bind(T.Cast("int64", self.starts[expert + i64(1)]) - first)
        return expert, first, count


def _group_choices(expert_ids: Expr, tokens: Expr, top_k: int, num_experts: int) -> _Groups:
    """A counting sort of the choices by expert."""
    order = scratch((tokens * i64(top_k),), "int32")
    starts = scratch((num_experts + 1,), "int32")
    ends = scratch((num_experts,), "int32")
    active = scratch((num_experts,), "int32")
    count = scratch((1,), "int32")
    one = T.int32(1)
    with T.serial(i64(num_experts)) as expert:
        T.buffer_store(ends, T.int32(0), [expert])
    with T.serial(tokens) as token, T.serial(i64(top_k)) as j:
        chosen = T.Bind(expert_ids[token, j])
        T.buffer_store(ends, ends[chosen] + one, [chosen])
    T.buffer_store(starts, T.int32(0), [i64(0)])
    T.buffer_store(count, T.int32(0), [i64(0)])
    with T.serial(i64(num_experts)) as expert:
        number = T.Bind(ends[expert])
        with T.If(number > T.int32(0)), T.Then():
            T.buffer_store(active, T.Cast("int32", expert), [count[i64(0)]])
            T.buffer_store(count, count[i64(0)] + one, [i64(0)])
        # From here on `ends` is where the expert's next choice goes.
        T.buffer_store(ends, starts[expert], [expert])
        T.buffer_store(starts, starts[expert] + number, [expert + i64(1)])
    with T.serial(tokens) as token, T.serial(i64(top_k)) as j:
        chosen = T.Bind(expert_ids[token, j])
        place = T.Bind(ends[chosen])
        T.buffer_store(order, T.Cast("int32", token * i64(top_k) + j), [place])
        T.buffer_store(ends, place + one, [chosen])
    return _Groups(
        order=order,
        starts=starts,
        active=active,
        num_active=T.Bind(T.Cast("int64", count[i64(0)])),
    )


def _fused(product: Product, groups: _Groups, x_rows: Expr, params: LinearParameters) -> None:
    """Tasks are panels of active experts, in the order in which they lie in memory."""
    weights = product.weights
    panels = i64(weights.panels)
    x = prepare_activations(weights, product.x, x_rows)
    with T.parallel(groups.num_active * panels) as task:
        expert, first, count = groups.of(T.floordiv(task, panels))
        panel = T.Bind(T.floormod(task, panels))
        fused_positions(product, x, expert, panel, first, count, params)


def _blocked(product: Product, groups: _Groups, params: LinearParameters) -> None:
    """Tasks are column blocks of active experts, columns outermost, so that a large expert is
    shared by all.
    """
    active = T.Bind(groups.num_active)
    divisor = T.Bind(T.max(active, i64(1)))
    with T.parallel(i64(num_column_blocks(product.weights, params)) * active) as task:
        expert, first, count = groups.of(T.floormod(task, divisor))
        multiply_columns(product, expert, T.floordiv(task, divisor), first, count, params)
