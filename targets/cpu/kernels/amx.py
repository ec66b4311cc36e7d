"""Matrix registers (Intel AMX): eight tiles of up to 16 rows of 64 bytes, and products with them.

A step multiplies tiles of activations `[rows, depth]` by tiles of weights, which hold the words of
one panel as it is stored: `[bytes / 4, 16 outputs]` words of four bytes. Sums of 32 bits stay in
four tiles `[rows, 16 outputs]`:

    tile    0 1 2 3              4 5            6 7
    holds   sums [group, panel]  a group's      a panel's
                                 activations    weights

The functions here run while an IRBuilder frame is open, as those of panels.py do. The instructions
fault until the operating system has allowed them to the process: llmc/cpu_features.py asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.kernels.panels import WeightPanels, i64
from llmc.targets.cpu.layout import ceildiv
from llmc.targets.cpu.parameters import TileParameters

Expr = Any
TILE_ROWS = 16
TILE_BYTES = 64  # of a row
PANELS = 2  # multiplied together, and as many groups of TILE_ROWS rows: loads serve two products
_ACTIVATIONS, _WEIGHTS = 4, 6
_LINE = 16  # words of a configuration

# (panels, first row, groups of rows, rows) -> None: multiplies and stores them
Block = Callable[[list[Expr], Expr, int, Expr], None]


def sum_tile(group: int, panel: int) -> int:
    """The tile that holds the sums of a group of rows and a panel."""
    return group * PANELS + panel


def activation_tile(group: int) -> int:
    """The tile for a group's activations."""
    return _ACTIVATIONS + group


def weight_tile(panel: int) -> int:
    """The tile for a panel's weights."""
    return _WEIGHTS + panel


def clear(tile: int) -> None:
    """Sets a tile to zero."""
    _emit("tilezero", T.uint8(tile))


def load(tile: int, address: Expr, stride: int) -> None:
    """Loads a tile's rows from `address`, `stride` bytes apart."""
    _emit("tileloadd64", T.uint8(tile), address, i64(stride))


def store(tile: int, address: Expr, stride: int) -> None:
    """Stores a tile's rows likewise."""
    _emit("tilestored64", T.uint8(tile), address, i64(stride))


def multiply(instruction: str, group: int, panel: int) -> None:
    """Adds a group's activations times a panel's weights to their sums."""
    tiles = (sum_tile(group, panel), activation_tile(group), weight_tile(panel))
    _emit(instruction, *(T.uint8(tile) for tile in tiles))


def _emit(instruction: str, *args: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{instruction}", *args))


def for_each_block(
    weights: WeightPanels,
    count: Expr,
    row_bytes: int,
    depth_bytes: int,
    params: TileParameters,
    prepare: Callable[[list[Expr]], Block],
) -> None:
    """Covers `count` rows × all panels by blocks of up to 2 groups of rows × 2 panels.

    Tasks are row blocks × columns of PANELS panels, rows outermost; each configures the tiles and
    releases them at its end. `prepare(panels)` runs once a task; steps take `depth_bytes` of a row
    of activations, which has `row_bytes`.
    """
    width = min(PANELS, weights.panels)
    columns, rest = divmod(weights.panels, width)
    columns += rest > 0
    largest = TILE_ROWS * PANELS
    size = max(1, params.row_block_bytes // row_bytes // largest) * largest
    row_blocks = T.Bind(T.floordiv(count + i64(size - 1), i64(size)))
    with T.parallel(i64(columns) * row_blocks) as task:
        first = T.Bind(T.floordiv(task, i64(columns)) * i64(size))
        rows = T.Bind(T.min(i64(size), count - first))
        panel = T.Bind(T.floormod(task, i64(columns)) * i64(width))

        def emit(num_panels: int) -> None:
            panels = [panel + i64(p) for p in range(num_panels)]
            _task(prepare(panels), panels, first, rows, depth_bytes)

        if not rest:
            emit(width)
        else:
            with T.If(panel + i64(width) <= i64(weights.panels)):
                with T.Then():
                    emit(width)
                with T.Else():
                    emit(rest)


def _task(block: Block, panels: list[Expr], first: Expr, rows: Expr, depth_bytes: int) -> None:
    """Rows first … first + rows - 1: pairs of full groups, a full group, the rest."""
    line = T.alloc_buffer(
        [i64(_LINE)], "int32", scope="local", annotations={"disable_lower_builtin": True}
    )
    pair = TILE_ROWS * PANELS
    pairs = T.Bind(T.floordiv(rows, i64(pair)))
    _configure(line, T.int32(TILE_ROWS), depth_bytes)
    with T.serial(pairs) as number:
        block(panels, T.Bind(first + number * i64(pair)), PANELS, i64(pair))
    left = T.Bind(rows - pairs * i64(pair))
    with T.serial(T.floordiv(left + i64(TILE_ROWS - 1), i64(TILE_ROWS))) as number:
        done = T.Bind(number * i64(TILE_ROWS))
        few = T.Bind(T.min(i64(TILE_ROWS), left - done))
        _configure(line, T.Cast("int32", few), depth_bytes)
        block(panels, T.Bind(first + pairs * i64(pair) + done), 1, few)
    _emit("tilerelease")


def _configure(line: Expr, rows: Expr, depth_bytes: int) -> None:
    """Gives sums and activations `rows` rows, and depths their bytes.

    The line of 64 bytes: palette 1 in byte 0, 16 bits for each tile's bytes of a row from byte 16
    on, 8 bits for its number of rows from byte 48 on (Intel SDM, LDTILECFG).
    """
    both = 0x00010001
    words = {
        0: T.int32(1),
        4: T.int32(TILE_BYTES * both),
        5: T.int32(TILE_BYTES * both),
        6: T.int32(depth_bytes * both),
        7: T.int32(TILE_BYTES * both),
        12: rows * T.int32(0x01010101),
        13: rows * T.int32(0x0101) + T.int32(ceildiv(depth_bytes, 4) * 0x01010000),
    }
    for i in range(_LINE):
        T.buffer_store(line, words.get(i, T.int32(0)), [i64(i)])
    _emit("ldtilecfg", T.address_of(line[i64(0)]))
