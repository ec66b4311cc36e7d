"""A projection: x `[1, T, K]` times a packed matrix `[M, K]`, plus bias and residual.

Buffers in order: x, the arrays of `packed_parts(fmt, m, k)`, bias `[M]` and residual `[1, T, M]`
where asked, y `[1, T, M]`; x, residual and y are of `dtype`, the bias of `vector_dtype`.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, kernel, put, to_f32, when
from llmc.targets.gpu.kernels import gemm, gemv
from llmc.targets.gpu.kernels.block import launch, rows_of
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import PANEL, ceildiv
from llmc.targets.gpu.parameters import GemvParameters

Expr = Any


class LinearArguments:
    """The kernel's buffers and its epilogue."""

    def __init__(
        self,
        fmt: WeightFormat,
        m: int,
        k: int,
        tokens: int | None,
        bias: bool,
        residual: bool,
        dtype: str,
        vector_dtype: str,
    ) -> None:
        self.rows = rows_of(tokens)
        self.x = argument("x", (1, self.rows, k), dtype)
        self.weights = Weights.arguments(fmt, m, k)
        self._bias = argument("bias", (m,), vector_dtype) if bias else None
        self._residual = argument("residual", (1, self.rows, m), dtype) if residual else None
        self.y = argument("y", (1, self.rows, m), dtype)

    def x_at(self, token: Expr) -> tuple[Expr, ...]:
        """A token's activations; the last one's for what lies behind it."""
        return i64(0), T.min(token, self.rows - i64(1))

    def store(self, token: Expr, feature: Expr, value: Expr) -> None:
        """Adds bias and residual and stores an output."""
        with when(token < self.rows):
            if self._bias is not None:
                value = value + to_f32(self._bias[feature])
            if self._residual is not None:
                value = value + to_f32(self._residual[i64(0), token, feature])
            put(self.y, value, 0, token, feature)


def linear_few(
    fmt: WeightFormat,
    m: int,
    k: int,
    tokens: int | None,
    *,
    bias: bool,
    residual: bool,
    dtype: str,
    vector_dtype: str,
    params: GemvParameters,
) -> PrimFunc:
    """The product for one token (`tokens` = 1) or a few; right for any number.

    Raises CompileError where the format cannot hold k features.
    """
    tile = 1 if tokens == 1 else params.token_tile
    with kernel("linear_few") as built:
        args = LinearArguments(fmt, m, k, tokens, bias, residual, dtype, vector_dtype)
        blocks = ceildiv(args.weights.panels, params.panels)
        grid = (blocks,) if tile == 1 and tokens == 1 else (blocks, T.ceildiv(args.rows, i64(tile)))
        with launch(grid, (PANEL, params.splits)) as (block, *tiles, lane, split):
            first = T.Bind(tiles[0] * i64(tile)) if tiles else i64(0)
            work = gemv.Work(
                x=args.x,
                x_at=lambda token: args.x_at(first + i64(token)),
                store=lambda token, row, value: args.store(first + token, row, value),
                expert=None,
                first_panel=T.Bind(block * i64(params.panels)),
                lane=lane,
                split=split,
            )
            gemv.multiply(args.weights, work, tile, params)
    return built.func


def linear_many(
    fmt: WeightFormat,
    m: int,
    k: int,
    *,
    bias: bool,
    residual: bool,
    dtype: str,
    vector_dtype: str,
    params: gemm.TileShape,
    multiply: gemm.MultiplyTile = gemm.multiply_tile,
) -> PrimFunc:
    """The product for many tokens; right for any number.

    `multiply` emits a block's products, by `params`. Raises CompileError where the format cannot
    hold k features.
    """
    with kernel("linear_many") as built:
        args = LinearArguments(fmt, m, k, None, bias, residual, dtype, vector_dtype)
        grid = (ceildiv(m, params.rows), T.ceildiv(args.rows, i64(params.tokens)))
        with launch(grid, (params.threads,)) as (block, tile, thread):
            first = T.Bind(tile * i64(params.tokens))
            work = gemm.TileWork(
                x=args.x,
                x_at=lambda token: (i64(0), first + token),
                store=lambda token, row, value: args.store(first + token, row, value),
                expert=None,
                count=T.Bind(args.rows - first),
                first_row=T.Bind(block * i64(params.rows)),
                thread=thread,
            )
            multiply(args.weights, work, params)
    return built.func
