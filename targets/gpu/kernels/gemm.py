"""Products of many tokens: a tile of weights is dequantized once for a tile of tokens.

A block makes `rows` outputs of `tokens` tokens. For each `depth` input features it puts weights and
activations into shared memory as float32, features first; a thread multiplies `thread_rows` by
`thread_tokens` of them out of registers, all sums in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import f32, i64, put, registers, when
from llmc.targets.gpu.kernels.block import read_vector, shared, sync
from llmc.targets.gpu.kernels.gemv import load_vector, vector_lanes
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import PANEL, ceildiv
from llmc.targets.gpu.parameters import GemmParameters

Expr = Any


@dataclass(frozen=True, slots=True)
class TileWork:
    """What a block multiplies; all int64.

    The tile's tokens 0 … count - 1 have work; count may be larger than a tile. x_at gives the
    leading indices of a token's activations; store takes a token, an output feature and its sum,
    and checks the token itself.
    """

    x: Expr
    x_at: Callable[[Expr], tuple[Expr, ...]]
    store: Callable[[Expr, Expr, Expr], None]
    expert: Expr | None
    first_row: Expr
    count: Expr
    thread: Expr


class TileShape(Protocol):
    """What of a tile's parameters matters to the launch."""

    @property
    def rows(self) -> int:
        """Output rows of a block, a multiple of a panel's."""

    @property
    def tokens(self) -> int:
        """Tokens of a block."""

    @property
    def threads(self) -> int:
        """Threads of a block."""


def multiply_tile(weights: Weights, work: TileWork, params: GemmParameters) -> None:
    """Emits the block's products; every thread has to come here."""
    depth = max(params.depth, weights.features)
    tile_w = shared((depth, params.rows))
    tile_x = shared((depth, params.tokens))
    sums = registers((params.thread_rows, params.thread_tokens))
    for row in range(params.thread_rows):
        for token in range(params.thread_tokens):
            put(sums, f32(0), row, token)
    # Threads that lie side by side take outputs side by side, `row_lanes` each, which they read at
    # once: no two of them meet in a bank.
    across = i64(params.rows // params.thread_rows)
    row_thread = T.Bind(T.floormod(work.thread, across))
    token_thread = T.Bind(T.floordiv(work.thread, across))

    def place(row: Expr, start: Expr) -> Callable[[int, Expr], None]:
        return lambda feature, value: put(tile_w, value, start + i64(feature), row)

    with T.serial(i64(ceildiv(weights.k, depth))) as step:
        first = T.Bind(step * i64(depth))
        load_weights(weights, work, params, first, depth, place)
        _load_activations(weights, work, tile_x, first, depth, params)
        sync()
        # Threads whose tokens are all missing only help to load.
        busy = token_thread * i64(params.thread_tokens) < work.count
        with when(busy), T.serial(i64(depth)) as feature:
            _multiply(tile_w, tile_x, sums, feature, row_thread, token_thread, params)
        sync()
    for row in range(params.thread_rows):
        lane = row % params.row_lanes
        start = across * i64(row - lane) + row_thread * i64(params.row_lanes)
        output = T.Bind(work.first_row + start + i64(lane))
        with when(output < i64(weights.m)):
            for token in range(params.thread_tokens):
                number = T.Bind(token_thread * i64(params.thread_tokens) + i64(token))
                work.store(number, output, sums[i64(row), i64(token)])


MultiplyTile = Callable[[Weights, TileWork, Any], None]
"""A function like `multiply_tile`, on parameters of its own that are a TileShape."""


def share(total: int, threads: int, thread: Expr, body: Callable[[Expr], None]) -> None:
    """body(0 … total - 1), shared among the block's threads."""
    with T.serial(i64(ceildiv(total, threads))) as i:
        item = T.Bind(i * i64(threads) + thread)
        if total % threads:
            with when(item < i64(total)):
                body(item)
        else:
            body(item)


def load_weights(
    weights: Weights,
    work: TileWork,
    shape: TileShape,
    first: Expr,
    depth: int,
    place: Callable[[Expr, Expr], Callable[[int, Expr], None]],
) -> None:
    """Dequantizes `depth` features of the block's rows; zeros behind the matrix' last chunk.

    place(row, feature) is asked for each chunk: its row in the tile and its first feature, counted
    from `first`. It returns what puts a number of the chunk where it belongs.
    """
    per_row = depth // weights.features

    def load(item: Expr) -> None:
        row = T.Bind(T.floormod(item, i64(shape.rows)))
        part = T.Bind(T.floordiv(item, i64(shape.rows)))
        chunk = T.Bind(T.floordiv(first, i64(weights.features)) + part)
        panel = T.Bind(T.floordiv(work.first_row + row, i64(PANEL)))
        lane = T.Bind(T.floormod(row, i64(PANEL)))
        store = place(row, T.Bind(part * i64(weights.features)))

        def fill() -> None:
            loaded = weights.chunk(work.expert, panel, chunk, lane)
            for feature, value in enumerate(loaded.values()):
                store(feature, value)

        conditions = []
        if weights.chunks % per_row:
            conditions.append(chunk < i64(weights.chunks))
        if weights.panels * PANEL % shape.rows:
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
                    store(feature, f32(0))

    share(per_row * shape.rows, shape.threads, work.thread, load)


def _load_activations(
    weights: Weights,
    work: TileWork,
    tile: Expr,
    first: Expr,
    depth: int,
    params: GemmParameters,
) -> None:
    """`depth` features of the tile's tokens, zeros behind the last feature."""
    lanes = vector_lanes(weights.k)
    vectors = depth // lanes

    def load(item: Expr) -> None:
        token = T.Bind(T.floordiv(item, i64(vectors)))
        column = T.Bind(T.floormod(item, i64(vectors)) * i64(lanes))
        values = registers((lanes,))

        def fill() -> None:
            load_vector(work.x, work.x_at(token), first + column, lanes, values)
            for lane in range(lanes):
                put(tile, values[i64(lane)], column + i64(lane), token)

        # What a missing token's place holds reaches no output but its own.
        with when(token < work.count):
            if weights.k % depth == 0:
                fill()
            else:
                with T.If(first + column < i64(weights.k)):
                    with T.Then():
                        fill()
                    with T.Else():
                        for lane in range(lanes):
                            put(tile, f32(0), column + i64(lane), token)

    share(vectors * params.tokens, params.threads, work.thread, load)


def _multiply(
    tile_w: Expr,
    tile_x: Expr,
    sums: Expr,
    feature: Expr,
    row_thread: Expr,
    token_thread: Expr,
    params: GemmParameters,
) -> None:
    """One input feature of the thread's outputs and tokens."""
    across = i64(params.rows // params.thread_rows)
    rows: list[Expr] = []
    for group in range(0, params.thread_rows, params.row_lanes):
        start = across * i64(group) + row_thread * i64(params.row_lanes)
        rows += read_vector(tile_w, (feature, start), params.row_lanes)
    first = T.Bind(token_thread * i64(params.thread_tokens))
    for group in range(0, params.thread_tokens, params.token_lanes):
        values = read_vector(tile_x, (feature, first + i64(group)), params.token_lanes)
        for token, value in enumerate(values, group):
            for row in range(params.thread_rows):
                put(sums, sums[i64(row), i64(token)] + rows[row] * value, row, token)
