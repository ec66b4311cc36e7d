"""A tile of a product on small square matrices, each spread over the threads of a subgroup.

As kernels/gemm.py: a block dequantizes `depth` features of its rows into shared memory, puts its
tokens' activations beside them and multiplies. Both lie there as squares (8 × 8 or 16 × 16 numbers)
that follow each other, weights features first and activations tokens first, so that a matrix is
read from consecutive numbers. Sums are float32.

Numbers in shared memory are float16 where the unit multiplies those: it holds every code exactly,
and what is beyond its range becomes its largest number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import f32, i64, put, registers, when
from llmc.targets.gpu.kernels.block import shared, sync
from llmc.targets.gpu.kernels.gemm import TileWork, load_weights, share
from llmc.targets.gpu.kernels.gemv import load_vector, vector_lanes
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import PANEL, ceildiv

Expr = Any
_LARGEST_HALF = 65504.0


class MatrixUnit(Protocol):
    """What multiplies matrices: every thread of a subgroup has to come to each of these calls.

    Matrices are counted within an allocation; a square is `side * side` numbers in shared memory,
    row by row.
    """

    @property
    def side(self) -> int:
        """Rows and columns of a matrix, a divisor of a panel's rows."""

    @property
    def subgroup(self) -> int:
        """Threads of a subgroup."""

    def dtype(self, fmt: WeightFormat) -> str:
        """The type that weights of a format are multiplied in, float16 or float32."""

    def subgroup_of(self, thread: Expr) -> Expr:
        """The number of a thread's subgroup in its block, int64."""

    def left(self, count: int, dtype: str) -> Expr:
        """Room for so many left factors."""

    def right(self, count: int, dtype: str) -> Expr:
        """Room for right factors."""

    def sums(self, count: int) -> Expr:
        """Room for float32 sums of products."""

    def clear(self, sums: Expr, number: int) -> None:
        """Sets a sum to zero."""

    def load(self, matrices: Expr, number: int, tile: Expr, at: Expr) -> None:
        """Reads the square at tile[at]."""

    def multiply(self, sums: Expr, place: int, a: tuple[Expr, int], b: tuple[Expr, int]) -> None:
        """sums[place] += a · b, each an allocation and a number."""

    def store(self, sums: Expr, number: int, out: Expr, at: Expr, stride: int) -> None:
        """Writes a sum to out `[rows, stride]`, its first number at the flat index `at`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixTile:
    """Tiles of rows by tokens a block, group_rows by group_tokens of them a subgroup."""

    unit: MatrixUnit
    rows: int
    tokens: int
    group_rows: int
    group_tokens: int
    depth: int  # input features in shared memory at a time, a whole chunk at least

    def __post_init__(self) -> None:
        side = self.unit.side
        assert self.rows % PANEL == 0, self
        assert self.rows % self.group_rows == 0, self
        assert self.tokens % self.group_tokens == 0, self
        assert self.group_rows % side == 0, self
        assert self.group_tokens % side == 0, self
        assert self.depth % side == 0, self

    @property
    def threads(self) -> int:
        """Threads of a block."""
        groups = (self.rows // self.group_rows) * (self.tokens // self.group_tokens)
        return self.unit.subgroup * groups


def multiply_tile(weights: Weights, work: TileWork, params: MatrixTile) -> None:
    """Emits the block's products; every thread has to come here."""
    _Tile(weights, work, params).emit()


class _Tile:
    """One block's rows and tokens."""

    def __init__(self, weights: Weights, work: TileWork, params: MatrixTile) -> None:
        self.weights, self.work, self.params = weights, work, params
        self.unit, self.side = params.unit, params.unit.side
        self.square = self.side * self.side
        self.dtype = self.unit.dtype(weights.fmt)
        self.depth = max(params.depth, weights.features)
        self.tile_w = shared((self.depth * params.rows,), self.dtype)
        self.tile_x = shared((self.depth * params.tokens,), self.dtype)
        across = params.rows // params.group_rows
        group = T.Bind(self.unit.subgroup_of(work.thread))
        self.num_rows = params.group_rows // self.side
        self.num_tokens = params.group_tokens // self.side
        self.group_row = T.Bind(T.floormod(group, i64(across)) * i64(self.num_rows))
        self.group_token = T.Bind(T.floordiv(group, i64(across)) * i64(self.num_tokens))
        self.sums = self.unit.sums(self.num_rows * self.num_tokens)
        self.rows = self.unit.right(self.num_rows, self.dtype)
        self.tokens = self.unit.left(self.num_tokens, self.dtype)

    def emit(self) -> None:
        """Walks the features and stores the outputs."""
        for number in range(self.num_rows * self.num_tokens):
            self.unit.clear(self.sums, number)
        with T.serial(i64(ceildiv(self.weights.k, self.depth))) as step:
            first = T.Bind(step * i64(self.depth))
            load_weights(self.weights, self.work, self.params, first, self.depth, self._place)
            self._load_activations(first)
            sync()
            with T.serial(i64(self.depth // self.side)) as slab:
                self._multiply(slab)
            sync()
        self._store()

    def _multiply(self, slab: Expr) -> None:
        """As many input features as a matrix has, of the subgroup's rows and tokens."""
        params = self.params
        row = T.Bind(slab * i64(params.rows // self.side) + self.group_row)
        token = T.Bind(slab * i64(params.tokens // self.side) + self.group_token)
        for number in range(self.num_rows):
            at = (row + i64(number)) * i64(self.square)
            self.unit.load(self.rows, number, self.tile_w, at)
        for number in range(self.num_tokens):
            at = (token + i64(number)) * i64(self.square)
            self.unit.load(self.tokens, number, self.tile_x, at)
        for t in range(self.num_tokens):
            for r in range(self.num_rows):
                place = t * self.num_rows + r
                self.unit.multiply(self.sums, place, (self.tokens, t), (self.rows, r))

    def _narrow(self, value: Expr) -> Expr:
        """A float32 as it is multiplied."""
        if self.dtype == "float32":
            return value
        return T.max(T.min(value, f32(_LARGEST_HALF)), f32(-_LARGEST_HALF))

    def _place(self, row: Expr, start: Expr) -> Callable[[int, Expr], None]:
        """Puts numbers of a row's chunk that begins with the feature `start`.

        Where chunks are shorter than a square's side, that is in the middle of a square, whose
        features are `side` numbers apart.
        """
        side, rows = self.side, self.params.rows
        base = T.Bind(
            T.floordiv(start, i64(side)) * i64(side * rows)
            + T.floormod(start, i64(side)) * i64(side)
            + T.floordiv(row, i64(side)) * i64(self.square)
            + T.floormod(row, i64(side))
        )

        def store(feature: int, value: Expr) -> None:
            slab, within = divmod(feature, side)
            put(self.tile_w, value, base + i64(slab * side * rows + within * side))

        return store

    def _load_activations(self, first: Expr) -> None:
        """`depth` features of the tile's tokens, zeros behind the last feature."""
        params, k = self.params, self.weights.k
        lanes = vector_lanes(k)
        vectors = self.depth // lanes

        def load(item: Expr) -> None:
            token = T.Bind(T.floordiv(item, i64(vectors)))
            column = T.Bind(T.floormod(item, i64(vectors)) * i64(lanes))
            values = registers((lanes,))
            block = T.floordiv(column, i64(self.side)) * i64(params.tokens // self.side)
            block = T.Bind(block + T.floordiv(token, i64(self.side)))
            line = T.floormod(token, i64(self.side)) * i64(self.side)
            at = T.Bind(block * i64(self.square) + line + T.floormod(column, i64(self.side)))

            def zero() -> None:
                for lane in range(lanes):
                    put(self.tile_x, f32(0), at + i64(lane))

            # A missing token's numbers meet no other's in a sum, but may not stay what they were.
            inside = token < self.work.count
            if k % self.depth:
                inside = T.And(inside, first + column < i64(k))
            with T.If(inside):
                with T.Then():
                    load_vector(self.work.x, self.work.x_at(token), first + column, lanes, values)
                    for lane in range(lanes):
                        put(self.tile_x, self._narrow(values[i64(lane)]), at + i64(lane))
                with T.Else():
                    zero()

        share(vectors * params.tokens, params.threads, self.work.thread, load)

    def _store(self) -> None:
        """Puts the sums where threads can read them, `[tokens, rows]`, and stores them."""
        params = self.params
        results = shared((params.tokens, params.rows))
        for t in range(self.num_tokens):
            for r in range(self.num_rows):
                token = (self.group_token + i64(t)) * i64(self.side)
                row = (self.group_row + i64(r)) * i64(self.side)
                at = token * i64(params.rows) + row
                place = t * self.num_rows + r
                self.unit.store(self.sums, place, results, at, params.rows)
        sync()

        def store(item: Expr) -> None:
            token = T.Bind(T.floordiv(item, i64(params.rows)))
            row = T.Bind(T.floormod(item, i64(params.rows)))
            output = T.Bind(self.work.first_row + row)
            with when(T.And(output < i64(self.weights.m), token < self.work.count)):
                self.work.store(token, output, T.Bind(results[token, row]))

        share(params.rows * params.tokens, params.threads, self.work.thread, store)
