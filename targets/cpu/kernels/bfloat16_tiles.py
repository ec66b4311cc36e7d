"""bfloat16 products of many activation rows in matrix registers, straight from packed weights.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.kernels import amx
from llmc.targets.cpu.kernels.panels import i64, lanes, registers
from llmc.targets.cpu.kernels.register_tiles import store_tile
from llmc.targets.cpu.kernels.tiles import Product
from llmc.targets.cpu.parameters import TileParameters

Expr = Any


def tile_depth(k: int) -> int:
    """Input features of one step: the most that divide k."""
    return gcd(k, amx.TILE_BYTES // 2)


def bfloat16_tiles(product: Product, x: Expr, count: Expr, params: TileParameters) -> None:
    """y = x · Wᵀ for `count` rows of x `[1, T, K]` uint16."""
    weights = product.weights
    depth = tile_depth(weights.k)

    def block(panels: list[Expr], first: Expr, groups: int, rows: Expr) -> None:
        size = groups * amx.TILE_ROWS * len(panels)
        sums = registers(size)
        tiles = [(g, p) for g in range(groups) for p in range(len(panels))]
        for g, p in tiles:
            amx.clear(amx.sum_tile(g, p))
        with T.serial(i64(weights.k // depth)) as step:
            for p, panel in enumerate(panels):
                word = weights.word_address(i64(0), panel, step * i64(depth // 2))
                amx.load(amx.weight_tile(p), word, amx.TILE_BYTES)
            for g in range(groups):
                row = first + i64(g * amx.TILE_ROWS)
                values = T.address_of(x[i64(0), row, step * i64(depth)])
                amx.load(amx.activation_tile(g), values, 2 * weights.k)
            for g, p in tiles:
                amx.multiply("tdpbf16ps", g, p)
        for g, p in tiles:
            at = T.address_of(sums[i64(g * amx.TILE_ROWS * len(panels) + p), i64(0)])
            amx.store(amx.sum_tile(g, p), at, amx.TILE_BYTES * len(panels))
        with T.serial(rows) as row:
            at = row * i64(len(panels))
            found = [sums[at + i64(p), lanes(i64(0))] for p in range(len(panels))]
            store_tile(product, panels, [first + row], [found])

    amx.for_each_block(weights, count, 2 * weights.k, 2 * depth, params, lambda _: block)
