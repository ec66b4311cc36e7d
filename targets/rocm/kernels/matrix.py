"""Products by matrix instructions: a wavefront's rows, out of memory into registers.

The chunks of a weight matrix (targets/gpu/layout.py) are what a lane needs of its row: it loads 16
bytes, decodes them, and they are its half of several instructions. No weight passes through shared
memory, none is decoded twice in a block.

Activations are rounded to the type that is multiplied (bfloat16 for bf16 weights, else float16,
where what is too large becomes the largest number) by a launch of their own, which cuts rows into
pieces of eight features and puts pieces of the same features of 16 rows side by side:

    arranged   [rows / 16, K' / 8, 16, 4]   int32, pairs, the even feature in the low half

K' is K filled up with zeros to whole steps of the kernels, so that none asks where a row ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import f32, i64, put, registers, to_f32, when
from llmc.targets.gpu.kernels.block import (
    launch,
    quotient,
    quotient_up,
    remainder,
    shared,
    sync,
    workspace,
)
from llmc.targets.gpu.kernels.gemm import TileWork
from llmc.targets.gpu.kernels.kv_pages import KV_TYPES
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import CHUNK_WORDS, PANEL, ceildiv, chunk_features
from llmc.targets.rocm.kernels.matrix_instruction import SIDE, MatrixInstruction
from llmc.targets.rocm.parameters import MatrixTile

Expr = Any
PIECE = 8  # features of 16 bytes
_WORDS = 4  # of a piece
_ARRANGE_THREADS = 256
_LARGEST = 65504.0  # of float16


def multiplies(fmt: WeightFormat) -> bool:
    """Whether there are instructions for weights of this format: not for float32's."""
    return fmt.bits <= 16


def multiplied_type(fmt: WeightFormat) -> str:
    """What weights and activations are rounded to."""
    return "bfloat16" if fmt.float_dtype == "bfloat16" else "float16"


@dataclass(frozen=True, slots=True)
class Step:
    """The features that a wavefront multiplies at a time: whole chunks, whole instructions."""

    fmt: WeightFormat
    instruction: MatrixInstruction

    @property
    def lane_features(self) -> int:
        """Of a lane."""
        return max(chunk_features(self.fmt), self.instruction.lane_features)

    @property
    def lane_chunks(self) -> int:
        """Chunks of a lane."""
        return self.lane_features // chunk_features(self.fmt)

    @property
    def lane_pieces(self) -> int:
        """Pieces of a lane."""
        return self.lane_features // PIECE

    @property
    def features(self) -> int:
        """Of the wavefront."""
        return self.lane_features * self.instruction.groups

    def of(self, tile: MatrixTile) -> int:
        """Of a block's turn."""
        return self.features * tile.splits * tile.depth

    def padded(self, k: int, tiles: Sequence[MatrixTile]) -> int:
        """K': k filled up to whole turns of whichever kernel goes furthest."""
        return max(ceildiv(k, self.of(tile)) * self.of(tile) for tile in tiles)


def arrange(x: Expr, at: tuple[Expr, ...], rows: Expr, k: int, padded: int, dtype: str) -> Expr:
    """Launches what rounds and orders the activations x[(*at, row, feature)]; what they become."""
    pieces = padded // PIECE
    tiles = T.Bind(quotient_up(rows, SIDE))
    arranged = workspace((tiles, pieces, SIDE, _WORDS), "int32")
    count = tiles * i64(pieces * SIDE)
    with launch((quotient_up(count, _ARRANGE_THREADS),), (_ARRANGE_THREADS,)) as (block, thread):
        item = T.Bind(block * i64(_ARRANGE_THREADS) + thread)
        with when(item < count):
            line = T.Bind(remainder(item, SIDE))
            piece = T.Bind(remainder(quotient(item, SIDE), pieces))
            tile = T.Bind(quotient(item, SIDE * pieces))
            # A row behind the last one repeats it: nobody stores what becomes of it.
            row = T.Bind(T.min(tile * i64(SIDE) + line, rows - i64(1)))
            for word in range(_WORDS):
                pair = []
                for half in range(2):
                    feature = T.Bind(piece * i64(PIECE) + i64(2 * word + half))
                    value = to_f32(x[(*at, row, T.min(feature, i64(k - 1)))])
                    pair.append(T.Select(feature < i64(k), value, f32(0)))
                put(arranged, pack_pair(dtype, *pair), tile, piece, line, word)
    return arranged


def pack_pair(dtype: str, low: Expr, high: Expr) -> Expr:
    """Two float32 as `dtype` in an int32, the first in the low half."""
    halves = [T.Cast("int32", _round(dtype, value)) for value in (low, high)]
    return T.bitwise_or(halves[0], T.shift_left(halves[1], T.int32(16)))


def _round(dtype: str, value: Expr) -> Expr:
    """The bits of a float32 as `dtype`, uint16."""
    if dtype == "bfloat16":
        return KV_TYPES["uint16"].from_float(value)
    bounded = T.max(T.min(value, f32(_LARGEST)), f32(-_LARGEST))
    return T.reinterpret("uint16", T.Cast("float16", bounded))


def multiply_tile(
    weights: Weights, work: TileWork, tile: MatrixTile, instruction: MatrixInstruction
) -> None:
    """Emits the block's products; every thread has to come here.

    work.x is what `arrange` made, with a K' that does for `tile`; the last of x_at's indices is a
    row of it.
    """
    Product(weights, work, tile, instruction).emit()


class Product:
    """One block's product."""

    def __init__(
        self,
        weights: Weights,
        work: TileWork,
        tile: MatrixTile,
        instruction: MatrixInstruction,
    ) -> None:
        self.weights, self.work, self.tile = weights, work, tile
        self.instruction = instruction
        self.step = Step(weights.fmt, instruction)
        self.dtype = multiplied_type(weights.fmt)
        wave = T.Bind(quotient(work.thread, instruction.wavefront))
        self.lane = T.Bind(remainder(work.thread, instruction.wavefront))
        self.line = T.Bind(instruction.line(self.lane))
        self.group = T.Bind(instruction.group(self.lane))
        self.split = T.Bind(wave // i64(tile.waves))
        self.wave = T.Bind(wave % i64(tile.waves))
        # A tile's panels and lanes: 16 rows are half of a panel.
        self.rows = [
            T.Bind(work.first_row + (self.wave * i64(tile.row_tiles) + i64(n)) * i64(SIDE))
            for n in range(tile.row_tiles)
        ]
        self.sums = registers((tile.row_tiles, tile.token_tiles, instruction.outputs))

    def emit(self) -> None:
        """Emits everything."""
        tile, step = self.tile, self.step
        for row in range(tile.row_tiles):
            for token in range(tile.token_tiles):
                for output in range(self.instruction.outputs):
                    put(self.sums, f32(0), row, token, output)
        turn = step.of(tile)
        if tile.shared:
            stage = shared((tile.token_tiles, turn // PIECE, SIDE, _WORDS), "int32")
        else:
            places = [self._place(self._token(n)) for n in range(tile.token_tiles)]
        with T.serial(i64(ceildiv(self.weights.k, turn))) as number:
            first = T.Bind(number * i64(tile.splits) + self.split)
            loaded = [self._load(first * i64(tile.depth) + i64(part)) for part in range(tile.depth)]
            if tile.shared:
                self._fill(stage, number * i64(turn // PIECE))
                sync()
            for part, chunks in enumerate(loaded):
                a = self._decode(chunks)
                for token in range(tile.token_tiles):
                    if tile.shared:
                        place: tuple[Expr, ...] = (i64(token), self.line)
                        b = self._fragment(stage, place, i64(part))
                    else:
                        at = first * i64(tile.depth) + i64(part)
                        b = self._fragment(self.work.x, places[token], at)
                    self.multiply(a, b, token)
            if tile.shared:
                sync()
        self._finish()

    def _token(self, token_tile: int) -> Expr:
        """The token of the tile that this lane holds."""
        return i64(SIDE * token_tile) + self.line

    def _place(self, token: Expr) -> tuple[Expr, Expr]:
        """A token's tile and line in what `arrange` made; the last one's for missing tokens."""
        known = T.min(token, self.work.count - i64(1))
        row = T.Bind(self.work.x_at(known)[-1])
        return T.Bind(quotient(row, SIDE)), T.Bind(remainder(row, SIDE))

    def _load(self, step: Expr) -> list[list[Any]]:
        """The lane's chunks of its rows, by tiles of rows."""
        loaded = []
        for first_row in self.rows:
            row = T.Bind(first_row + self.line)
            # A panel behind the last one repeats it: nobody stores its sums.
            panel = T.Bind(T.min(quotient(row, PANEL), i64(self.weights.panels - 1)))
            place = T.Bind(remainder(row, PANEL))
            lane = step * i64(self.instruction.groups) + self.group
            first = T.Bind(lane * i64(self.step.lane_chunks))
            chunks = []
            for number in range(self.step.lane_chunks):
                # Activations behind the last chunk are zeros.
                chunk = T.Bind(T.min(first + i64(number), i64(self.weights.chunks - 1)))
                chunks.append(self.weights.chunk(self.work.expert, panel, chunk, place))
            loaded.append(chunks)
        return loaded

    def _decode(self, loaded: list[list[Any]]) -> list[Expr]:
        """The chunks as pairs of the type that is multiplied, int32 registers by tiles of rows."""
        decoded = []
        for chunks in loaded:
            words = registers((self.step.lane_features // 2,), "int32")
            at = 0
            for chunk in chunks:
                if self.weights.fmt.is_float:
                    pairs = [chunk.words[i64(word)] for word in range(CHUNK_WORDS)]
                else:
                    values = chunk.values()
                    pairs = [
                        pack_pair(self.dtype, *values[n : n + 2]) for n in range(0, len(values), 2)
                    ]
                for pair in pairs:
                    put(words, pair, at)
                    at += 1
            decoded.append(words)
        return decoded

    def _fragment(self, source: Expr, place: tuple[Expr, Expr], step: Expr) -> Expr:
        """The lane's activations of a step, as `_decode` gives its weights."""
        words = registers((self.step.lane_features // 2,), "int32")
        pieces = self.step.lane_pieces
        first = T.Bind((step * i64(self.instruction.groups) + self.group) * i64(pieces))
        tile, line = place
        for piece in range(pieces):
            vector = source[tile, first + i64(piece), line, T.ramp(i64(0), i64(1), _WORDS)]
            T.buffer_store(words, vector, [T.ramp(i64(_WORDS * piece), i64(1), _WORDS)])
        return words

    def _fill(self, stage: Expr, first: Expr) -> None:
        """The turn's activations of the block's tokens into shared memory."""
        tile = self.tile
        pieces = self.step.of(tile) // PIECE
        threads = tile.waves * tile.splits * self.instruction.wavefront
        total = tile.tokens * pieces
        with T.serial(i64(ceildiv(total, threads))) as i:
            item = T.Bind(i * i64(threads) + self.work.thread)
            line = T.Bind(remainder(item, SIDE))
            piece = T.Bind(remainder(quotient(item, SIDE), pieces))
            token_tile = T.Bind(quotient(item, SIDE * pieces))

            def copy() -> None:
                source, source_line = self._place(token_tile * i64(SIDE) + line)
                words = T.ramp(i64(0), i64(1), _WORDS)
                vector = self.work.x[source, first + piece, source_line, words]
                T.buffer_store(stage, vector, [token_tile, piece, line, words])

            if total % threads:
                with when(item < i64(total)):
                    copy()
            else:
                copy()

    def multiply(self, a: list[Expr], b: Expr, token: int) -> None:
        """Tokens are the rows of the instruction, output features its columns."""
        words = self.instruction.lane_features // 2
        for first in range(0, self.step.lane_features // 2, words):
            part = T.ramp(i64(first), i64(1), words)
            for row, weights in enumerate(a):
                at = (i64(row), i64(token))
                self.instruction.multiply(self.dtype, b[part], weights[part], self.sums, at)

    def _finish(self) -> None:
        """Adds the splits' sums and stores them."""
        tile, outputs = self.tile, self.instruction.outputs
        places = [
            (row, token, output)
            for row in range(tile.row_tiles)
            for token in range(tile.token_tiles)
            for output in range(outputs)
        ]
        if tile.splits == 1:
            for place in places:
                self._store(place, self.sums[tuple(i64(n) for n in place)])
            return
        lanes = tile.waves * self.instruction.wavefront
        partial = shared((tile.splits, len(places), lanes))
        column = T.Bind(self.wave * i64(self.instruction.wavefront) + self.lane)
        for number, place in enumerate(places):
            put(partial, self.sums[tuple(i64(n) for n in place)], self.split, number, column)
        sync()
        for number, place in enumerate(places):
            with when(self.split == i64(number % tile.splits)):
                total = partial[i64(0), i64(number), column]
                for split in range(1, tile.splits):
                    total = total + partial[i64(split), i64(number), column]
                self._store(place, T.Bind(total))

    def _store(self, place: tuple[int, int, int], value: Expr) -> None:
        row, token_tile, output = place
        feature = T.Bind(self.rows[row] + self.line)
        token = T.Bind(i64(SIDE * token_tile) + self.instruction.output_row(self.lane, output))
        with when(feature < i64(self.weights.m)):
            self.work.store(token, feature, value)
