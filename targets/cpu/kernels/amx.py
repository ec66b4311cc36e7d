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

from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64, on_stack
from llmc.targets.cpu.layout import ceildiv

Expr = Any
TILE_ROWS = 16
TILE_BYTES = 64  # of a row
PANELS = 2  # multiplied together, and as many groups of TILE_ROWS rows: loads serve two products
_ACTIVATIONS, _WEIGHTS = 4, 6
_LINE = 16  # words of a configuration


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


def load_once(tile: int, address: Expr, stride: int) -> None:
    """`load` of what the first-level cache need not keep."""
    _emit("tileloaddt164", T.uint8(tile), address, i64(stride))


def store(tile: int, address: Expr, stride: int) -> None:
    """Stores a tile's rows likewise."""
    _emit("tilestored64", T.uint8(tile), address, i64(stride))


def multiply(instruction: str, sums: int, activations: int, weights: int) -> None:
    """Adds the product of two tiles to a third."""
    _emit(instruction, *(T.uint8(tile) for tile in (sums, activations, weights)))


def _emit(instruction: str, *args: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{instruction}", *args))


def configure(depth_bytes: int) -> None:
    """Gives sums and activations sixteen rows, and depths their bytes.

    The line of 64 bytes: palette 1 in byte 0, 16 bits for each tile's bytes of a row from byte 16
    on, 8 bits for its number of rows from byte 48 on (Intel SDM, LDTILECFG).
    """
    line = on_stack((_LINE,), "int32")
    both = 0x00010001
    words = {
        0: 1,
        4: TILE_BYTES * both,
        5: TILE_BYTES * both,
        6: depth_bytes * both,
        7: TILE_BYTES * both,
        12: TILE_ROWS * 0x01010101,
        13: TILE_ROWS * 0x0101 + ceildiv(depth_bytes, 4) * 0x01010000,
    }
    for i in range(_LINE):
        T.buffer_store(line, T.int32(words.get(i, 0)), [i64(i)])
    _emit("ldtilecfg", T.address_of(line[i64(0)]))


def release() -> None:
    """Gives the tiles back: what was configured costs at every switch of threads."""
    _emit("tilerelease")
