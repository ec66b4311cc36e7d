"""Products of a few activation rows with one panel, its weights decoded in registers.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels.panels import (
    Rows,
    WeightPanels,
    decode,
    get,
    lanes,
    prefetch,
    put,
    registers,
    scratch,
    splat,
)
from llmc.targets.cpu.layout import PANEL, code_offsets, stored_zero_point
from llmc.targets.cpu.parameters import LinearParameters

Expr = Any


@dataclass(frozen=True, slots=True)
class Activations:
    """Rows of activations as the one-token product wants them.

    values: `[R, words · width]`, each feature already divided by the power of two its code
    decodes with, padding features zero; sums: `[R, groups]`, or None where the format needs none.
    """

    values: Rows
    sums: Expr | None


def prepare_activations(weights: WeightPanels, x: Rows, rows: Expr) -> Activations:
    """Copies x `[rows, K]` into the scaling and padding of `Activations`, with each group's sum."""
    width, words, k = weights.width, weights.words, weights.k
    if width * words == k and weights.fmt.is_float:
        return Activations(x, None)
    values = Rows(scratch((rows, words * width)), batched=False)
    sums = scratch((rows, weights.groups)) if weights.needs_sums else None
    factors = [1.0] * width
    if not weights.fmt.is_float:
        for position, offset in enumerate(code_offsets(weights.fmt)[:-1]):
            factors[offset] = 2.0 ** -(position * weights.fmt.bits)
    constants = [T.float32(factors[lane % width]) for lane in range(PANEL)]
    scaling = tirx.Shuffle(constants, list(range(PANEL)))
    in_group = k // weights.groups
    with T.serial(rows) as row, T.serial(i64(weights.groups)) as group:
        first = T.Bind(group * i64(in_group))
        total = registers(1)
        put(total, 0, splat(0.0))
        with T.serial(i64(in_group // PANEL)) as vector:
            at = lanes(first + vector * i64(PANEL))
            value = T.Bind(x.at(row, at))
            values.set(row, at, value * scaling)
            put(total, 0, get(total, 0) + value)
        rest: Expr = T.float32(0.0)
        # Only a group of a whole row ends within a vector, and only there may words need padding.
        for j in range(in_group - in_group % PANEL, words * width // weights.groups):
            value = T.Bind(x.at(row, first + i64(j))) if j < in_group else T.float32(0.0)
            values.set(row, first + i64(j), value * constants[j % width])
            rest = rest + value
        if sums is not None:
            whole = sum_pairwise([total[i64(0), i64(lane)] for lane in range(PANEL)])
            T.buffer_store(sums, whole + rest, [row, group])
    return Activations(values, sums)


def dot_panel(
    weights: WeightPanels,
    expert: Expr,
    panel: Expr,
    x: Activations,
    rows: Sequence[Expr],
    params: LinearParameters,
) -> list[Expr]:
    """The products of a few activation rows with a panel's 16 rows, a float32x16 for each.

    Codes are multiplied first and scaled once a group: acc += scale · (Σ code·x - zero·Σx) +
    min · Σx. Words are asked for `prefetch_words` early, across the ends of panels, where hardware
    prefetchers start anew.
    """
    fmt, width, per_group = weights.fmt, weights.width, weights.words_per_group
    zero = stored_zero_point(fmt)
    # About eight chains of multiply-adds hide their latency.
    num_parts = max(1, min(4, 8 // len(rows)))
    num_chains = len(rows) * num_parts
    sums = registers(num_chains + len(rows))

    def add_words(parts: list[Expr], first: Expr, count: int) -> list[Expr]:
        index = 0
        for j in range(count):
            at = first + i64(j)
            prefetch(weights.word_address(expert, panel, at + i64(params.prefetch_words)))
            word = T.Bind(weights.word(expert, panel, at))
            for code in decode(fmt, word):
                value = T.Bind(code.value)
                for r, row in enumerate(rows):
                    factor = x.values.at(row, at * i64(width) + i64(code.offset))
                    part = r * num_parts + index % num_parts
                    parts[part] = T.Bind(parts[part] + value * T.broadcast(factor, PANEL))
                index += 1
        return parts

    for r in range(len(rows)):
        put(sums, num_chains + r, splat(0.0))
    with T.serial(i64(weights.groups)) as group:
        parts = [splat(0.0)] * num_chains
        if zero and x.sums is not None:
            for r, row in enumerate(rows):
                parts[r * num_parts] = T.broadcast(
                    x.sums[row, group] * T.float32(-float(zero)), PANEL
                )
        steps, tail = divmod(per_group, params.gemv_words)
        base = group * i64(per_group)
        if steps == 1:
            parts = add_words(parts, base, params.gemv_words)
        elif steps:
            for i in range(num_chains):
                put(sums, i, parts[i])
            with T.serial(i64(steps)) as step:
                parts = [get(sums, i) for i in range(num_chains)]
                first = base + step * i64(params.gemv_words)
                for i, part in enumerate(add_words(parts, first, params.gemv_words)):
                    put(sums, i, part)
            parts = [get(sums, i) for i in range(num_chains)]
        if tail:
            parts = add_words(parts, base + i64(steps * params.gemv_words), tail)
        _add_group(weights, expert, panel, group, x, rows, parts, sums)
    return [get(sums, num_chains + r) for r in range(len(rows))]


def _add_group(
    weights: WeightPanels,
    expert: Expr,
    panel: Expr,
    group: Expr,
    x: Activations,
    rows: Sequence[Expr],
    parts: list[Expr],
    sums: Expr,
) -> None:
    """Scales the finished sums of a group and adds them to the rows' totals."""
    num_parts = len(parts) // len(rows)
    scale = None if weights.fmt.is_float else T.Bind(weights.scale(expert, panel, group))
    minimum = T.Bind(weights.minimum(expert, panel, group)) if weights.fmt.has_min else None
    for r, row in enumerate(rows):
        product = sum_pairwise(parts[r * num_parts : (r + 1) * num_parts])
        if scale is not None:
            product = product * scale
        if minimum is not None and x.sums is not None:
            product = product + minimum * T.broadcast(x.sums[row, group], PANEL)
        total = len(parts) + r
        put(sums, total, get(sums, total) + product)


def sum_pairwise(values: Sequence[Expr]) -> Expr:
    """The sum as a balanced tree."""
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return sum_pairwise(values[:half]) + sum_pairwise(values[half:])
