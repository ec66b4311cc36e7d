"""Products of many activation rows in matrix registers, in bfloat16 with float32 sums.

Both factors lie in tiles of 1 KiB, the order in which the registers are loaded: activations are
brought into it once a product, weights of other formats than bfloat16 once a task (tile_tasks.py).
Sums wait in memory between chunks.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.panels import lanes, prefetch, scratch
from llmc.targets.cpu.kernels.tile_tasks import (
    Chunks,
    TileTask,
    first_bytes,
    for_each_task,
    multiply_step,
    place_of,
    row_groups,
    store_sums,
)
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.kernels.unpacked_bfloat16 import unpack_step
from llmc.targets.cpu.layout import PANEL
from llmc.targets.cpu.parameters import TileParameters

Expr = Any
# (row, first feature) -> 16 consecutive features of an activation row as bfloat16 (uint16x16)
Values = Callable[[Expr, Expr], Expr]


def tile_depth(k: int) -> int:
    """Input features of one step: the most that divide k."""
    return gcd(k, amx.TILE_BYTES // 2)


def bfloat16_tiles(product: Product, values: Values, count: Expr, params: TileParameters) -> None:
    """y = x · Wᵀ for `count` rows of activations; k is a multiple of 16."""
    weights = product.weights
    depth = tile_depth(weights.k)
    chunks = Chunks.of(weights.k // depth, params.steps, max(1, weights.fmt.group // depth))
    activations = scratch((row_groups(count), chunks.steps, amx.TILE_ROWS, depth), "uint16")
    # What rows past the last make the registers compute is not stored.
    tile_activations(activations, values, count)
    for_each_task(product, count, params, lambda task: _emit(task, activations, chunks, depth))


def tile_activations(tiles: Expr, values: Values, rows: Expr) -> None:
    """Puts `rows` rows into tiles `[groups, steps, 16, depth]`; further ones stay unwritten."""
    steps, depth = int(tiles.shape[1]), int(tiles.shape[3])
    with T.parallel(rows) as row:
        group, place = place_of(row)
        with T.serial(i64(steps)) as step:
            for part in range(0, depth, PANEL):
                found = values(row, step * i64(depth) + i64(part))
                T.buffer_store(tiles, found, [group, step, place, lanes(i64(part))])


def _emit(task: TileTask, activations: Expr, chunks: Chunks, depth: int) -> None:
    """Multiplies and stores a task; activations `[groups, steps, 16, depth]` uint16."""
    weights = task.product.weights
    amx.configure(2 * depth)
    gated = task.product.gated is not None
    # What one chunk sums up leaves each block's sums at once, if it is an output by itself.
    keep = chunks.count > 1 or gated
    blocks = (task.size, task.width) if keep else (amx.PANELS, amx.PANELS)
    totals = scratch((*blocks, amx.TILE_ROWS, PANEL))
    unpacked = None
    if not weights.fmt.is_float:
        unpacked = scratch((amx.PANELS, chunks.size, depth // 2, PANEL), "int32")

    def stage(number: Expr, slot: Expr) -> None:
        """All rows times a chunk of the two panels from `slot` on."""
        start = chunks.start(number)
        steps = chunks.length(start)
        slots = task.stage_panels(slot)
        if unpacked is not None:
            with T.serial(slots) as p, T.serial(steps) as step:
                unpack_step(weights, task.panel(slot + p), start + step, unpacked, p, step)

        def weight(p: int, step: Expr) -> Expr:
            if unpacked is not None:
                return first_bytes(unpacked, i64(p), step)
            word = (start + step) * i64(depth // 2)
            return weights.word_address(i64(0), task.panel(slot + i64(p)), word)

        def block(group: Expr, groups: int, panels: int) -> None:
            tiles = [(g, p) for g in range(groups) for p in range(panels)]

            def place(g: int, p: int) -> tuple[Expr, Expr]:
                """Where totals hold a group and panel of this block, or of those behind it."""
                first = (group, slot) if keep else (i64(0), i64(0))
                return first[0] + i64(g), first[1] + i64(p)

            with T.If(number == i64(0)):
                with T.Then():
                    for g, p in tiles:
                        amx.clear(amx.sum_tile(g, p))
                with T.Else():
                    for g, p in tiles:
                        at = first_bytes(totals, *place(g, p))
                        amx.load(amx.sum_tile(g, p), at, amx.TILE_BYTES)
            with T.serial(steps) as step:
                if keep:
                    # The next block's sums, whose loads nothing else would hide.
                    for g, p in tiles:
                        prefetch(T.address_of(totals[*place(amx.PANELS + g, p), step, i64(0)]))
                found = [task.first_group + group + i64(g) for g in range(groups)]
                multiply_step(
                    "tdpbf16ps",
                    [first_bytes(activations, g, start + step) for g in found],
                    [weight(p, step) for p in range(panels)],
                    2 * depth,
                )
            for g, p in tiles:
                store_sums(amx.sum_tile(g, p), totals, *place(g, p))
            if gated:
                return
            with T.If(number == i64(chunks.count - 1)), T.Then():
                for g in range(groups):
                    first = task.first_row(group + i64(g))
                    with T.serial(task.rows_from(first)) as row:
                        sums = [totals[*place(g, p), row, lanes(i64(0))] for p in range(panels)]
                        task.store_row(slot, first + row, sums)

        # The panels' weights stay in the first-level cache while rows pass.
        def column(panels: int) -> None:
            task.for_each_block(lambda group, groups: block(group, groups, panels))

        task.with_width(slots, column)

    task.for_each_stage(chunks.count, stage)
    if gated:
        task.store_gated(totals)
    amx.release()
