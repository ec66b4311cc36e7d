"""Products of few tokens: what counts is to read each weight once, 16 bytes at a time.

A block of 32 × splits threads makes `panels` panels of outputs for up to `token_tile` tokens. A
thread has one row of each panel and every splits-th chunk of it, so that the block reads the panel
from front to back; the splits' sums meet in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import f32, i64, put, registers, to_f32, when
from llmc.targets.gpu.kernels.block import shared, sync
from llmc.targets.gpu.kernels.weights import Weights
from llmc.targets.gpu.layout import PANEL, ceildiv
from llmc.targets.gpu.parameters import GemvParameters

Expr = Any


@dataclass(frozen=True, slots=True)
class Work:
    """What a block multiplies; all int64.

    x_at gives the leading indices of tile token 0 … token_tile - 1's activations, all of them valid
    rows; store takes a token, an output feature and its sum, and checks the token itself.
    """

    x: Expr
    x_at: Callable[[int], tuple[Expr, ...]]
    store: Callable[[Expr, Expr, Expr], None]
    expert: Expr | None
    first_panel: Expr
    lane: Expr
    split: Expr


def vector_lanes(k: int) -> int:
    """Elements of a row of k that one load takes: every row has to start at such a boundary."""
    return 4 if k % 4 == 0 else 1


def multiply(weights: Weights, work: Work, token_tile: int, params: GemvParameters) -> None:
    """Emits the block's products; every thread has to come here."""
    sums = registers((params.panels, token_tile))
    for panel in range(params.panels):
        for token in range(token_tile):
            put(sums, f32(0), panel, token)
    full, rest = divmod(weights.k, weights.features)

    def step(chunk: Expr, count: int) -> None:
        _accumulate(weights, work, sums, chunk, count, token_tile, params)

    splits = params.splits
    if full:
        with T.serial(i64(ceildiv(full, splits))) as i:
            chunk = T.Bind(i * i64(splits) + work.split)
            if full % splits:
                with when(chunk < i64(full)):
                    step(chunk, weights.features)
            else:
                step(chunk, weights.features)
    if rest:
        with when(work.split == i64(full % splits)):
            step(i64(full), rest)
    _finish(weights, work, sums, token_tile, params)


def _accumulate(
    weights: Weights,
    work: Work,
    sums: Expr,
    chunk: Expr,
    count: int,
    token_tile: int,
    params: GemvParameters,
) -> None:
    """The first `count` features of a chunk, of every panel and token."""
    last = i64(weights.panels - 1)
    panels = []
    for panel in range(params.panels):
        number = work.first_panel + i64(panel)
        # A panel past the last one repeats it: nobody stores its sums.
        number = T.min(number, last) if weights.panels % params.panels else number
        loaded = weights.chunk(work.expert, number, chunk, work.lane)
        values = loaded.values()[:count]
        panels.append([T.Bind(v) for v in values] if token_tile > 1 else values)
    lanes = vector_lanes(weights.k)
    start = T.Bind(chunk * i64(weights.features))
    x_values = registers((lanes,))
    for token in range(token_tile):
        for first in range(0, count, lanes):
            load_vector(work.x, work.x_at(token), start + i64(first), lanes, x_values)
            for panel, values in enumerate(panels):
                total = sums[i64(panel), i64(token)]
                for lane in range(lanes):
                    total = total + values[first + lane] * x_values[i64(lane)]
                put(sums, total, panel, token)


def load_vector(x: Expr, at: tuple[Expr, ...], column: Expr, lanes: int, into: Expr) -> None:
    """`lanes` consecutive elements as float32 into registers."""
    if lanes == 1:
        put(into, x[(*at, column)], 0)
        return
    vector = x[(*at, T.ramp(column, i64(1), lanes))]
    if str(x.ty.dtype) != "float32":
        vector = T.Cast(f"float32x{lanes}", vector)
    T.buffer_store(into, vector, [T.ramp(i64(0), i64(1), lanes)])


def _finish(
    weights: Weights, work: Work, sums: Expr, token_tile: int, params: GemvParameters
) -> None:
    """Adds the splits' sums and stores them, each split a part of them."""

    def feature(panel: int) -> Expr:
        return (work.first_panel + i64(panel)) * i64(PANEL) + work.lane

    def store(panel: int, token: int, value: Expr) -> None:
        row = T.Bind(feature(panel))
        with when(row < i64(weights.m)):
            work.store(i64(token), row, value)

    pairs = [(p, t) for p in range(params.panels) for t in range(token_tile)]
    if params.splits == 1:
        for panel, token in pairs:
            store(panel, token, to_f32(sums[i64(panel), i64(token)]))
        return
    partial = shared((params.splits, len(pairs), PANEL))
    for number, (panel, token) in enumerate(pairs):
        put(partial, sums[i64(panel), i64(token)], work.split, number, work.lane)
    sync()
    for number, (panel, token) in enumerate(pairs):
        with when(work.split == i64(number % params.splits)):
            total = partial[i64(0), i64(number), work.lane]
            for split in range(1, params.splits):
                total = total + partial[i64(split), i64(number), work.lane]
            store(panel, token, T.Bind(total))
