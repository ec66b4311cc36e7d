"""Projections and experts by matrix instructions; buffers as in targets/gpu/kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import i64, kernel
from llmc.targets.gpu.kernels.block import launch, quotient_up
from llmc.targets.gpu.kernels.gemm import TileWork
from llmc.targets.gpu.kernels.linear import LinearArguments
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.rocm.kernels.matrix import Step, arrange, multiplied_type, multiply_tile
from llmc.targets.rocm.kernels.matrix_instruction import MatrixInstruction
from llmc.targets.rocm.parameters import MatrixPlan, MatrixTile

Expr = Any


def linear_matrix(
    fmt: WeightFormat,
    m: int,
    k: int,
    *,
    bias: bool,
    residual: bool,
    dtype: str,
    vector_dtype: str,
    plan: MatrixPlan,
) -> PrimFunc:
    """The product for any number of tokens: their number decides which kernel of the plan follows.

    Raises CompileError where the format cannot hold k features.
    """
    with kernel("linear_matrix") as built:
        args = LinearArguments(fmt, m, k, None, bias, residual, dtype, vector_dtype)
        padded = Step(fmt, plan.instruction).padded(k, plan.kernels)
        arranged = arrange(args.x, (i64(0),), args.rows, k, padded, multiplied_type(fmt))

        def multiply(tile: MatrixTile) -> None:
            block_threads = threads(tile, plan.instruction)
            # Blocks of the same rows follow each other: the weights come from memory once.
            grid = (quotient_up(args.rows, tile.tokens), ceildiv(m, tile.rows))
            with launch(grid, (block_threads,)) as (token_tile, row_tile, thread):
                first = T.Bind(token_tile * i64(tile.tokens))
                work = TileWork(
                    x=arranged,
                    x_at=lambda token: (first + token,),
                    store=lambda token, row, value: args.store(first + token, row, value),
                    expert=None,
                    count=T.Bind(args.rows - first),
                    first_row=T.Bind(row_tile * i64(tile.rows)),
                    thread=thread,
                )
                multiply_tile(args.weights, work, tile, plan.instruction)

        _choose(args.rows, plan, multiply, 0)
    return built.func


def threads(tile: MatrixTile, instruction: MatrixInstruction) -> int:
    """Threads of a block."""
    return tile.waves * tile.splits * instruction.wavefront


def _choose(
    tokens: Expr, plan: MatrixPlan, multiply: Callable[[MatrixTile], None], number: int
) -> None:
    """The first kernel from `number` on that serves as many tokens."""
    if number == len(plan.steps):
        multiply(plan.last)
        return
    most, tile = plan.steps[number]
    with T.If(tokens <= i64(most)):
        with T.Then():
            multiply(tile)
        with T.Else():
            _choose(tokens, plan, multiply, number + 1)


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """Implements llmc.targets.gpu.kernels.grouped_tiles.Tile."""

    tile: MatrixTile
    instruction: MatrixInstruction

    @property
    def rows(self) -> int:
        """Output rows of a block."""
        return self.tile.rows

    @property
    def tokens(self) -> int:
        """Choices of a block."""
        return self.tile.tokens

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return threads(self.tile, self.instruction)

    def arrange(self, x: Expr, rows: Expr, weights: Weights) -> Expr:
        """Launches the rounding of x `[rows, K]`."""
        dtype = multiplied_type(weights.fmt)
        padded = Step(weights.fmt, self.instruction).padded(weights.k, [self.tile])
        return arrange(x, (), rows, weights.k, padded, dtype)

    def multiply(self, weights: Weights, work: TileWork) -> None:
        """Emits the block's products."""
        multiply_tile(weights, work, self.tile, self.instruction)
