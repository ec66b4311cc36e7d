"""The experts' product of a mixture-of-experts layer: every row goes through its own matrix.

Buffers in order: x `[T, K]` (a token's row serves its top_k experts) or `[T · top_k, K]` (a row for
each choice), expert_ids `[T, top_k]` i32, the arrays of `packed_parts(fmt, m, k, num_experts=X)`,
bias `[X, M]` where asked, y `[T · top_k, M]`; row `t · top_k + j` belongs to choice `j` of token
`t`. x and y are of `dtype`, the bias of `vector_dtype`.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, kernel, put, to_f32
from llmc.targets.gpu.kernels import gemv
from llmc.targets.gpu.kernels.block import launch, rows_of
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import PANEL, ceildiv
from llmc.targets.gpu.parameters import GemvParameters

Expr = Any


def grouped_linear(
    fmt: WeightFormat,
    num_experts: int,
    m: int,
    k: int,
    top_k: int,
    *,
    tokens: int | None,
    per_token_input: bool,
    bias: bool,
    dtype: str,
    vector_dtype: str,
    params: GemvParameters,
) -> PrimFunc:
    """The product with `num_experts` matrices `[m, k]`; a block has one choice.

    Only chosen experts' weights are read. Ids have to be in 0 … num_experts - 1: they are not
    checked here. Raises CompileError where the format cannot hold k features.
    """
    with kernel("grouped_linear") as built:
        rows = rows_of(tokens)
        choices = rows * i64(top_k)
        x = argument("x", (rows if per_token_input else choices, k), dtype)
        expert_ids = argument("expert_ids", (rows, top_k), "int32")
        weights = Weights.arguments(fmt, m, k, num_experts)
        biases = argument("bias", (num_experts, m), vector_dtype) if bias else None
        y = argument("y", (choices, m), dtype)
        grid = (ceildiv(weights.panels, params.panels), choices)
        with launch(grid, (PANEL, params.splits)) as (block, choice, lane, split):
            token = T.Bind(T.floordiv(choice, i64(top_k)))
            expert = T.Bind(T.Cast("int64", expert_ids[token, T.floormod(choice, i64(top_k))]))

            def store(_: Expr, feature: Expr, value: Expr) -> None:
                if biases is not None:
                    value = value + to_f32(biases[expert, feature])
                put(y, value, choice, feature)

            work = gemv.Work(
                x=x,
                x_at=lambda _: (token if per_token_input else choice,),
                store=store,
                expert=expert,
                first_panel=T.Bind(block * i64(params.panels)),
                lane=lane,
                split=split,
            )
            gemv.multiply(weights, work, 1, params)
    return built.func
