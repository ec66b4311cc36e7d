"""The experts' product of many tokens: choices sorted by expert, then a tile of them at a time.

Three launches: the first counts each expert's choices and the second lists them, a thread for each
expert, in the order of the tokens; the third multiplies. A tile never holds choices of two experts,
so that it reads one matrix. The buffers are those of kernels/grouped_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, kernel, put, registers, size_var, to_f32, when
from llmc.targets.gpu.kernels import gemm
from llmc.targets.gpu.kernels.block import launch, quotient, remainder, when_all, workspace
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import ceildiv

Expr = Any
SORT_THREADS = 32


class Tile(Protocol):
    """How a block multiplies its choices with its rows of an expert's matrix."""

    @property
    def rows(self) -> int:
        """Output rows of a block."""

    @property
    def tokens(self) -> int:
        """Choices of a block."""

    @property
    def threads(self) -> int:
        """Threads of a block."""

    def arrange(self, x: Expr, rows: Expr, weights: Weights) -> Expr:
        """Launches what has to be done with x `[rows, K]` before; what `multiply` is to read."""

    def multiply(self, weights: Weights, work: gemm.TileWork) -> None:
        """Emits the block's products; every thread has to come here."""


@dataclass(frozen=True, slots=True)
class FloatTile:
    """As products of many tokens are: in float32 on any GPU, unless `by` does it otherwise."""

    params: gemm.TileShape
    by: gemm.MultiplyTile = gemm.multiply_tile

    @property
    def rows(self) -> int:
        """Output rows of a block."""
        return self.params.rows

    @property
    def tokens(self) -> int:
        """Choices of a block."""
        return self.params.tokens

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.params.threads

    def arrange(self, x: Expr, rows: Expr, weights: Weights) -> Expr:
        """x as it is."""
        return x

    def multiply(self, weights: Weights, work: gemm.TileWork) -> None:
        """Emits the block's products."""
        self.by(weights, work, self.params)


def grouped_tiles(
    fmt: WeightFormat,
    num_experts: int,
    m: int,
    k: int,
    top_k: int,
    *,
    per_token_input: bool,
    bias: bool,
    dtype: str,
    vector_dtype: str,
    tile: Tile,
) -> PrimFunc:
    """The product with `num_experts` matrices `[m, k]` for any number of tokens.

    Ids have to be in 0 … num_experts - 1: a choice of another expert is not computed. `multiply`
    emits a block's products, by `params`. Raises CompileError where the format cannot hold k
    features.
    """
    with kernel("grouped_tiles") as built:
        rows = size_var("num_tokens")
        choices = rows * i64(top_k)
        x = argument("x", (rows if per_token_input else choices, k), dtype)
        expert_ids = argument("expert_ids", (rows, top_k), "int32")
        weights = Weights.arguments(fmt, m, k, num_experts)
        biases = argument("bias", (num_experts, m), vector_dtype) if bias else None
        y = argument("y", (choices, m), dtype)
        groups = _Groups(
            counts=workspace((num_experts,), "int32"),
            order=workspace((choices,), "int32"),
            num_experts=num_experts,
        )
        groups.sort(expert_ids, choices, top_k)
        arranged = tile.arrange(x, rows if per_token_input else choices, weights)
        tiles = quotient(choices, tile.tokens) + i64(num_experts)
        grid = (ceildiv(m, tile.rows), tiles)
        with launch(grid, (tile.threads,)) as (block, number, thread):
            found = registers((3,), "int32")
            groups.find(number, tile.tokens, found)
            with when_all(found[i64(0)] >= T.int32(0)):
                expert = T.Bind(T.Cast("int64", found[i64(0)]))
                first = T.Bind(T.Cast("int64", found[i64(1)]))
                count = T.Bind(T.Cast("int64", found[i64(2)]))

                def choice(token: Expr) -> Expr:
                    return T.Cast("int64", groups.order[first + token])

                def x_at(token: Expr) -> tuple[Expr, ...]:
                    row = choice(token)
                    return (quotient(row, top_k) if per_token_input else row,)

                def store(token: Expr, feature: Expr, value: Expr) -> None:
                    with when(token < count):
                        if biases is not None:
                            value = value + to_f32(biases[expert, feature])
                        put(y, value, choice(token), feature)

                work = gemm.TileWork(
                    x=arranged,
                    x_at=x_at,
                    store=store,
                    expert=expert,
                    count=count,
                    first_row=T.Bind(block * i64(tile.rows)),
                    thread=thread,
                )
                tile.multiply(weights, work)
    return built.func


@dataclass(frozen=True, slots=True)
class _Groups:
    """The choices by expert; all int32: counts `[X]`, order `[T · top_k]`."""

    counts: Expr
    order: Expr
    num_experts: int

    def sort(self, expert_ids: Expr, choices: Expr, top_k: int) -> None:
        """Emits both launches: no thread writes where another one does, so the order is fixed."""
        blocks = ceildiv(self.num_experts, SORT_THREADS)
        for listing in (False, True):
            with launch((blocks,), (SORT_THREADS,)) as (block, thread):
                expert = T.Bind(T.Cast("int32", block * i64(SORT_THREADS) + thread))
                with when(expert < T.int32(self.num_experts)):
                    place = registers((1,), "int32")
                    put(place, T.int32(0), 0)
                    if listing:
                        with T.serial(T.Cast("int64", expert)) as before:
                            put(place, place[i64(0)] + self.counts[before], 0)
                    with T.serial(choices) as choice:
                        at = (quotient(choice, top_k), remainder(choice, top_k))
                        with when(expert_ids[at] == expert):
                            if listing:
                                number = T.Cast("int32", choice)
                                put(self.order, number, T.Cast("int64", place[i64(0)]))
                            put(place, place[i64(0)] + T.int32(1), 0)
                    if not listing:
                        put(self.counts, place[i64(0)], T.Cast("int64", expert))

    def find(self, tile: Expr, tokens: int, found: Expr) -> None:
        """found = (expert or -1, first place in `order`, choices) of tile number `tile`."""
        start, left = registers((1,), "int32"), registers((1,), "int32")
        put(found, T.int32(-1), 0)
        put(start, T.int32(0), 0)
        put(left, T.Cast("int32", tile), 0)
        with T.serial(i64(self.num_experts)) as expert:
            count = T.Bind(self.counts[expert])
            tiles = T.Bind(T.truncdiv(count + T.int32(tokens - 1), T.int32(tokens)))
            inside = T.And(left[i64(0)] >= T.int32(0), left[i64(0)] < tiles)
            with when(inside):
                skipped = T.Bind(left[i64(0)] * T.int32(tokens))
                put(found, T.Cast("int32", expert), 0)
                put(found, start[i64(0)] + skipped, 1)
                put(found, T.min(count - skipped, T.int32(tokens)), 2)
            put(left, left[i64(0)] - tiles, 0)
            put(start, start[i64(0)] + count, 0)
