"""A tile of a product on simdgroup matrices: 8 × 8 numbers, spread over a simdgroup's threads.

As targets/gpu/kernels/gemm.py: a block dequantizes `depth` features of its rows into threadgroup
memory, puts its tokens' activations beside them and multiplies. Both lie there as blocks of 8 × 8
numbers that follow each other, weights features first and activations tokens first, so that a
matrix is read from 64 numbers in a row. Sums are float32.

Numbers in threadgroup memory are float16, which holds every code exactly; what is beyond its range
becomes its largest number. Weights of bfloat16 and float32 are multiplied as float32, because
float16 would round them or lose their range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.gpu.kernels.block import f32, i64, put, registers, shared, sync, when
from llmc.targets.gpu.kernels.gemm import TileWork
from llmc.targets.gpu.kernels.gemv import load_vector, vector_lanes
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import PANEL, ceildiv
from llmc.targets.metal.parameters import SIMDGROUP, TILE, SimdgroupParameters

Expr = Any
_BLOCK = TILE * TILE
_LARGEST_HALF = 65504.0


def tile_dtype(fmt: WeightFormat) -> str:
    """The type that weights of a format are multiplied in."""
    return "float32" if fmt.float_dtype in ("float32", "bfloat16") else "float16"


def multiply_tile(weights: Weights, work: TileWork, params: SimdgroupParameters) -> None:
    """Emits the block's products; every thread has to come here."""
    _Tile(weights, work, params).emit()


class _Tile:
    """One block's rows and tokens."""

    def __init__(self, weights: Weights, work: TileWork, params: SimdgroupParameters) -> None:
        self.weights, self.work, self.params = weights, work, params
        self.dtype = tile_dtype(weights.fmt)
        self.depth = max(params.depth, weights.features)
        self.tile_w = shared((self.depth * params.rows,), self.dtype)
        self.tile_x = shared((self.depth * params.tokens,), self.dtype)
        across = params.rows // params.group_rows
        group = T.Bind(T.floordiv(work.thread, i64(SIMDGROUP)))
        self.group_row = T.Bind(T.floormod(group, i64(across)) * i64(params.group_rows // TILE))
        self.group_token = T.Bind(T.floordiv(group, i64(across)) * i64(params.group_tokens // TILE))
        self.num_rows = params.group_rows // TILE
        self.num_tokens = params.group_tokens // TILE
        self.sums = _matrices(self.num_rows * self.num_tokens, "float32")
        self.rows = _matrices(self.num_rows, self.dtype)
        self.tokens = _matrices(self.num_tokens, self.dtype)

    def emit(self) -> None:
        """Walks the features and stores the outputs."""
        for number in range(self.num_rows * self.num_tokens):
            T.evaluate(
                T.metal.make_filled_simdgroup_matrix(self.sums.data, number, f32(0), TILE, TILE)
            )
        with T.serial(i64(ceildiv(self.weights.k, self.depth))) as step:
            first = T.Bind(step * i64(self.depth))
            self._load_weights(first)
            self._load_activations(first)
            sync()
            with T.serial(i64(self.depth // TILE)) as slab:
                self._multiply(slab)
            sync()
        self._store()

    def _multiply(self, slab: Expr) -> None:
        """Eight input features of the simdgroup's rows and tokens."""
        params = self.params
        row = T.Bind(slab * i64(params.rows // TILE) + self.group_row)
        token = T.Bind(slab * i64(params.tokens // TILE) + self.group_token)
        for number in range(self.num_rows):
            _load(self.rows, number, self.tile_w, (row + i64(number)) * i64(_BLOCK))
        for number in range(self.num_tokens):
            _load(self.tokens, number, self.tile_x, (token + i64(number)) * i64(_BLOCK))
        for t in range(self.num_tokens):
            for r in range(self.num_rows):
                place = t * self.num_rows + r
                T.evaluate(
                    T.metal.simdgroup_multiply_accumulate(
                        *(self.sums.data, place, self.tokens.data, t),
                        *(self.rows.data, r, self.sums.data, place),
                    )
                )

    def _narrow(self, value: Expr) -> Expr:
        """A float32 as it is multiplied."""
        if self.dtype == "float32":
            return value
        return T.max(T.min(value, f32(_LARGEST_HALF)), f32(-_LARGEST_HALF))

    def _shares(self, total: int, body: Callable[[Expr], None]) -> None:
        """body(0 … total - 1), shared among the block's threads."""
        threads = self.params.threads
        with T.serial(i64(ceildiv(total, threads))) as i:
            item = T.Bind(i * i64(threads) + self.work.thread)
            if total % threads:
                with when(item < i64(total)):
                    body(item)
            else:
                body(item)

    def _load_weights(self, first: Expr) -> None:
        """Dequantizes `depth` features of the block's rows; zeros behind the last chunk."""
        weights, params = self.weights, self.params
        per_row = self.depth // weights.features

        def load(item: Expr) -> None:
            row = T.Bind(T.floormod(item, i64(params.rows)))
            part = T.Bind(T.floordiv(item, i64(params.rows)))
            chunk = T.Bind(T.floordiv(first, i64(weights.features)) + part)
            panel = T.Bind(T.floordiv(self.work.first_row + row, i64(PANEL)))
            lane = T.Bind(T.floormod(row, i64(PANEL)))
            # Of the chunk's first feature, in the middle of a block where chunks are shorter than
            # it: features of a block are 8 numbers apart.
            start = T.Bind(part * i64(weights.features))
            base = T.Bind(
                T.floordiv(start, i64(TILE)) * i64(TILE * params.rows)
                + T.floormod(start, i64(TILE)) * i64(TILE)
                + T.floordiv(row, i64(TILE)) * i64(_BLOCK)
                + T.floormod(row, i64(TILE))
            )

            def at(feature: int) -> Expr:
                slab, within = divmod(feature, TILE)
                return base + i64(slab * TILE * params.rows + within * TILE)

            def fill() -> None:
                loaded = weights.chunk(self.work.expert, panel, chunk, lane)
                for feature, value in enumerate(loaded.values()):
                    put(self.tile_w, value, at(feature))

            conditions = []
            if weights.chunks % per_row:
                conditions.append(chunk < i64(weights.chunks))
            if weights.panels * PANEL % params.rows:
                conditions.append(panel < i64(weights.panels))
            if not conditions:
                fill()
                return
            inside = conditions[0] if len(conditions) == 1 else T.And(*conditions)
            with T.If(inside):
                with T.Then():
                    fill()
                with T.Else():
                    for feature in range(weights.features):
                        put(self.tile_w, f32(0), at(feature))

        self._shares(per_row * params.rows, load)

    def _load_activations(self, first: Expr) -> None:
        """`depth` features of the tile's tokens, zeros behind the last feature."""
        params, k = self.params, self.weights.k
        lanes = vector_lanes(k)
        vectors = self.depth // lanes

        def load(item: Expr) -> None:
            token = T.Bind(T.floordiv(item, i64(vectors)))
            column = T.Bind(T.floormod(item, i64(vectors)) * i64(lanes))
            values = registers((lanes,))
            block = T.floordiv(column, i64(TILE)) * i64(params.tokens // TILE)
            block = T.Bind(block + T.floordiv(token, i64(TILE)))
            within = T.floormod(token, i64(TILE)) * i64(TILE) + T.floormod(column, i64(TILE))
            at = T.Bind(block * i64(_BLOCK) + within)

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

        self._shares(vectors * params.tokens, load)

    def _store(self) -> None:
        """Puts the sums where threads can read them, `[tokens, rows]`, and stores them."""
        params = self.params
        results = shared((params.tokens, params.rows))
        for t in range(self.num_tokens):
            for r in range(self.num_rows):
                token = (self.group_token + i64(t)) * i64(TILE)
                row = (self.group_row + i64(r)) * i64(TILE)
                T.evaluate(
                    T.metal.simdgroup_store(
                        *(self.sums.data, t * self.num_rows + r),
                        results.access_ptr("w", offset=token * i64(params.rows) + row),
                        *(params.rows, TILE, TILE, False),
                    )
                )
        sync()

        def store(item: Expr) -> None:
            token = T.Bind(T.floordiv(item, i64(params.rows)))
            row = T.Bind(T.floormod(item, i64(params.rows)))
            output = T.Bind(self.work.first_row + row)
            with when(T.And(output < i64(self.weights.m), token < self.work.count)):
                self.work.store(token, output, T.Bind(results[token, row]))

        self._shares(params.rows * params.tokens, store)


def _matrices(count: int, dtype: str) -> Expr:
    """So many simdgroup matrices."""
    return T.alloc_buffer([i64(count), i64(_BLOCK)], dtype, scope="metal.simdgroup")


def _load(matrices: Expr, number: int, tile: Expr, at: Expr) -> None:
    """One block of 64 numbers."""
    place = tile.access_ptr("r", offset=at)
    T.evaluate(T.metal.simdgroup_load(matrices.data, number, place, TILE, TILE, TILE, False))
