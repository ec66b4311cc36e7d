"""Weights in bfloat16 for matrix registers: the words of a panel as pairs of features.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels.panels import F32X16, WeightPanels, lanes, splat
from llmc.targets.cpu.layout import PANEL, stored_zero_point

Expr = Any
STEP = 32
"""Features that are unpacked at a time, as many as a tile has."""
_MANTISSA_BITS = 23
_EXPONENT = 0x4B000000  # of 2^23: below it the mantissa's lowest bit is one


def unpack_step(
    weights: WeightPanels, panel: Expr, step: Expr, into: Expr, slot: Expr, place: Expr
) -> None:
    """Features 32 · step … of a panel, rounded to bfloat16, as 16 vectors of pairs.

    into: `[slots, places, 16, 16]` int32. A code becomes a float where it stands in its word, as
    part of a mantissa whose value the fused offset takes back; its place leaves enough bits for
    the offset (2^-9 of a scale at worst, where bfloat16 rounds codes of 8 bits to 2^-2).
    """
    fmt, width = weights.fmt, weights.width
    span = min(fmt.group or STEP, STEP)
    for part in range(STEP // span):
        group = i64(0)
        if fmt.group:
            group = T.floordiv(step * i64(STEP) + i64(part * span), i64(fmt.group))
        scale = T.Bind(weights.scale(i64(0), panel, group))
        minimum = T.Bind(weights.minimum(i64(0), panel, group)) if fmt.has_min else None
        factors: dict[int, tuple[Expr, Expr]] = {}
        for number in range(span // width):
            first = part * span + number * width
            word = T.Bind(
                weights.word(i64(0), panel, step * i64(STEP // width) + i64(first // width))
            )
            for pair in range(width // 2):
                low, high = (
                    _value(word, fmt.bits, 2 * pair + i, scale, minimum, weights, factors)
                    for i in range(2)
                )
                row = (first + 2 * pair) // 2
                T.buffer_store(
                    into, rounded_pairs(low, high), [slot, place, i64(row), lanes(i64(0))]
                )


def _value(
    word: Expr,
    bits: int,
    feature: int,
    scale: Expr,
    minimum: Expr | None,
    weights: WeightPanels,
    factors: dict[int, tuple[Expr, Expr]],
) -> Expr:
    """Feature `feature` of a word, float32x16; `factors` keeps what belongs to a position."""
    found = 8 * (feature % 4) + 4 * (feature // 4)
    position = _position(found, bits)
    bits_of = word
    if found > position:
        bits_of = T.reinterpret(
            "int32x16",
            T.shift_right(
                T.reinterpret("uint32x16", word), T.broadcast(T.uint32(found - position), PANEL)
            ),
        )
    elif found < position:
        bits_of = T.shift_left(word, T.broadcast(T.int32(position - found), PANEL))
    mask = ((1 << bits) - 1) << position
    mantissa = T.bitwise_and(bits_of, T.broadcast(T.int32(mask), PANEL))
    number = T.bitwise_or(mantissa, T.broadcast(T.int32(_EXPONENT), PANEL))
    if position not in factors:
        factor = T.Bind(scale * splat(2.0**-position))
        zero = 2.0 ** (_MANTISSA_BITS - position) + stored_zero_point(weights.fmt)
        offset = scale * splat(-zero)
        if minimum is not None:
            offset = offset + minimum
        factors[position] = factor, T.Bind(offset)
    factor, offset = factors[position]
    return T.Bind(T.reinterpret(F32X16, number) * factor + offset)


def _position(found: int, bits: int) -> int:
    """Where in the mantissa a field is read: two places, so that shifts serve two fields."""
    if bits == 8:
        return 8
    return 12 if found % 8 == 0 else 16


def rounded_pairs(low: Expr, high: Expr) -> Expr:
    """Two numbers a lane, rounded to the nearest bfloat16, half way up: the first one lower."""

    def bits(value: Expr) -> Expr:
        half = T.broadcast(T.uint32(0x8000), PANEL)
        return T.reinterpret("uint32x16", value) + half

    lower = T.shift_right(bits(low), T.broadcast(T.uint32(16), PANEL))
    upper = T.bitwise_and(bits(high), T.broadcast(T.uint32(0xFFFF0000), PANEL))
    return T.reinterpret("int32x16", T.bitwise_or(lower, upper))
