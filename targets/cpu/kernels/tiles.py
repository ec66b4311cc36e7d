"""The register tile of a product with an unpacked weight block, and the guarded stores of its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmc.targets.cpu.kernels.panels import Registers, get, i64, lanes, put, registers, splat
from llmc.targets.cpu.layout import PANEL
from tvm.script.ir_builder import tirx as T

Expr = Any


def store_panel(m: int, column: Expr, value: Expr, store: Callable[[Expr, Expr], None]) -> None:
    """Stores 16 outputs from `column`, or as many as a matrix of m rows has there.

    `store(index, value)` is called with a vector index and value, or for a partial panel with scalar ones.
    """
    rest = m % PANEL
    if rest == 0:
        store(lanes(column), value)
        return
    full = column + i64(PANEL) <= i64(m)
    with T.If(full):
        with T.Then():
            store(lanes(column), value)
        with T.Else():
            spill = registers(1)
            put(spill, 0, value)
            with T.serial(i64(rest)) as lane:
                store(column + lane, spill.buffer[i64(0), i64(0), lane])


def load_panel(m: int, column: Expr, load: Callable[[Expr], Expr], into: Registers, index: int) -> None:
    """Sets `registers` vector `index` to the 16 values that `load(index)` has from `column`, zero past row m."""
    rest = m % PANEL
    if rest == 0:
        put(into, index, load(lanes(column)))
        return
    with T.If(column + i64(PANEL) <= i64(m)):
        with T.Then():
            put(into, index, load(lanes(column)))
        with T.Else():
            partial = registers(1)
            put(partial, 0, splat(0.0))
            with T.serial(i64(rest)) as lane:
                T.buffer_store(partial.buffer, load(column + lane), [i64(0), i64(0), lane])
            put(into, index, get(partial, 0))


def multiply_tile(
    acc: Registers,
    block: Expr,
    features: Expr,
    rows: Sequence[Callable[[Expr], Expr]],
    num_panels: int,
) -> None:
    """acc[r · num_panels + p] += Σ_k rows[r](k) · block[k, p, 16] for k < features.

    `rows[r](k)` is the scalar activation of row r. The accumulators stay in registers over the loop.
    """
    with T.serial(features) as k:
        weights = [T.Bind(block[k, lanes(i64(p * PANEL))]) for p in range(num_panels)]
        for r, row in enumerate(rows):
            x = T.Bind(T.broadcast(row(k), PANEL))
            for p in range(num_panels):
                index = r * num_panels + p
                put(acc, index, get(acc, index) + x * weights[p])
