"""Activations as signed bytes: a scale for each block of features, and what the codes add up to."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import Expr, PrimFunc

from llmc.targets.cpu.kernels.math import lane_max
from llmc.targets.cpu.kernels.vector import LANES, at, for_rows, registers, spread

LIMIT = 127.0
# Added to a float32 of small magnitude, it leaves the nearest integer in the low mantissa bits.
ROUNDING = 12582912.0
ROUNDING_BITS = 0x4B400000


def quantize_activations(
    *, features: int, block: int, unit: int, factor: int, tokens: int | None = None
) -> PrimFunc:
    """Rounds x to codes -127 … 127; buffers x, codes, scales, sums.

    x `[1, T, K]` f32; codes `[1, T, K]` int8 with x ≈ code · scale; scales `[1, T, K / block]` f32,
    the block's largest |x| / 127; sums `[1, T, K / unit]` int32: a unit's codes added up, times
    `factor`. block is a multiple of unit, unit of 16. `tokens` is T where it is fixed.
    """
    assert features % block == 0, (features, block, unit)
    assert block % unit == 0, (features, block, unit)
    assert unit % LANES == 0, (features, block, unit)
    units = block // unit

    @T.inline
    def quantize_row(x, codes, scales, sums, row):
        for b in range(features // block):
            with T.sblock("block"):
                T.reads()
                T.writes()
                largest = registers(LANES)
                largest[at(0, LANES)] = spread(T.float32(0), LANES)
                for c in range(block // LANES):
                    value: T.let = x[0, row, at(b * block + c * LANES, LANES)]
                    largest[at(0, LANES)] = T.max(
                        largest[at(0, LANES)], T.max(value, spread(T.float32(0), LANES) - value)
                    )
                peak: T.let = lane_max(largest[at(0, LANES)])
                scales[0, row, b] = peak * T.float32(1 / LIMIT)
                inverse: T.let = T.if_then_else(
                    peak > T.float32(0), T.float32(LIMIT) / peak, T.float32(0)
                )
                for u in range(units):
                    with T.sblock("unit"):
                        T.reads()
                        T.writes()
                        total = registers(LANES, "int32")
                        total[at(0, LANES)] = spread(T.int32(0), LANES)
                        start: T.let = b * block + u * unit
                        for c in range(unit // LANES):
                            shifted: T.let = x[0, row, at(start + c * LANES, LANES)] * spread(
                                inverse, LANES
                            ) + spread(T.float32(ROUNDING), LANES)
                            code: T.let = T.reinterpret("int32x16", shifted) - spread(
                                T.int32(ROUNDING_BITS), LANES
                            )
                            codes[0, row, at(start + c * LANES, LANES)] = T.Cast("int8x16", code)
                            total[at(0, LANES)] = total[at(0, LANES)] + code
                        sums[0, row, b * units + u] = T.int32(factor) * _sum(total[at(0, LANES)])

    @T.prim_func(s_tir=True)
    def quantize_activations(
        x_h: T.handle, codes_h: T.handle, scales_h: T.handle, sums_h: T.handle
    ):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t = T.int64()
        rows = T.meta_var(t if tokens is None else tokens)
        x = T.match_buffer(x_h, (1, rows, features), "float32")
        codes = T.match_buffer(codes_h, (1, rows, features), "int8")
        scales = T.match_buffer(scales_h, (1, rows, features // block), "float32")
        sums = T.match_buffer(sums_h, (1, rows, features // unit), "int32")

        @T.inline
        def one_row(row):
            quantize_row(x, codes, scales, sums, row)

        for_rows(rows, features, one_row)

    return quantize_activations


def _sum(vector: Expr) -> Expr:
    """The sum of 16 int32."""
    return T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add.v16i32", vector)
