"""Where a kernel's results go that the next product takes narrow: bytes with scales, or bfloat16.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.errors import UnsupportedError
from llmc.targets.building import argument, i64, on_stack
from llmc.targets.cpu.kernels import avx512, vector
from llmc.targets.cpu.kernels.bfloat16 import from_float32
from llmc.targets.cpu.kernels.math import gelu, gelu_tanh, relu, silu
from llmc.targets.cpu.kernels.panels import (
    WHOLE,
    WHOLE_BITS,
    get,
    lanes,
    put,
    registers,
    splat,
)
from llmc.targets.cpu.layout import PANEL

Expr = Any
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
AVX512_ACTIVATIONS = {"silu": avx512.silu}
_LIMIT = 127.0


_VECTORS = 8  # that are stored together at most: what registers hold


class Output(Protocol):
    """Rows of features, stored in blocks of `block` (a multiple of 16) features."""

    @property
    def block(self) -> int:
        """Features of a block."""

    def store(self, row: Expr, block: Expr, values: Sequence[Expr]) -> None:
        """Stores one, two, four or eight blocks of a row from `block` on, sixteen features a vector
        (float32).
        """


def blocks_together(output: Output) -> int:
    """Blocks that are best stored in one call: a power of two."""
    return max(1, _VECTORS * PANEL // output.block)


def for_each_block(output: Output, blocks: int, store: Callable[[Expr, int], None]) -> None:
    """`store(first, count)` for all blocks of a row, several at a time."""
    together = blocks_together(output)
    done = blocks // together * together
    with T.serial(i64(blocks // together)) as number:
        store(T.Bind(number * i64(together)), together)
    while done < blocks:
        together //= 2
        if done + together <= blocks:
            store(i64(done), together)
            done += together


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Signed bytes, a scale for each block, and what the codes of each unit add up to.

    codes `[1, T, K]` int8, -127 … 127; scales `[1, T, K / block]` f32, the block's largest
    |x| / 127; sums `[1, T, K / unit]` int32, times `factor`. block is a multiple of unit, unit of
    16.
    """

    codes: Expr
    scales: Expr
    sums: Expr
    block: int
    unit: int
    factor: int

    @classmethod
    def arguments(
        cls, count: Expr, features: int, *, block: int, unit: int, factor: int
    ) -> Quantized:
        """Declares the kernel's next arguments: codes, scales and sums of `count` rows."""
        assert features % block == 0, (features, block, unit)
        assert block % unit == 0, (features, block, unit)
        assert unit % PANEL == 0, (features, block, unit)
        codes = argument("out_codes", (1, count, features), "int8")
        scales = argument("out_scales", (1, count, features // block))
        sums = argument("out_sums", (1, count, features // unit), "int32")
        return cls(codes=codes, scales=scales, sums=sums, block=block, unit=unit, factor=factor)

    def store(self, row: Expr, block: Expr, values: Sequence[Expr]) -> None:
        """Rounds blocks."""
        of_block, of_unit = self.block // PANEL, self.unit // PANEL
        count = len(values) // of_block
        # What is used several times is kept in registers, not bound: TVM's analyses put what is
        # bound in place of its name.
        kept = registers(len(values) + count)
        for v, value in enumerate(values):
            put(kept, v, value)
        for b in range(count):
            peak = splat(0.0)
            for v in range(b * of_block, (b + 1) * of_block):
                peak = T.max(peak, T.max(get(kept, v), splat(0.0) - get(kept, v)))
            put(kept, len(values) + b, peak)
        peaks, inverses = on_stack((count,), "float32"), on_stack((count,), "float32")
        everything = vector.at(i64(0), count)
        largest = [get(kept, len(values) + b) for b in range(count)]
        T.buffer_store(peaks, fold(largest, T.max), [everything])
        found = peaks[everything] * vector.spread(T.float32(1 / _LIMIT), count)
        T.buffer_store(self.scales, found, [i64(0), row, vector.at(block, count)])
        T.buffer_store(inverses, _inverse(peaks[everything], count), [everything])
        units = len(values) // of_unit
        totals = on_stack((units * PANEL,), "int32")
        for v in range(len(values)):
            inverse = T.broadcast(inverses[i64(v // of_block)], PANEL)
            code = T.Bind(rounded(get(kept, v) * inverse))
            at = block * i64(self.block) + i64(v * PANEL)
            T.buffer_store(self.codes, T.Cast("int8x16", code), [i64(0), row, lanes(at)])
            unit = lanes(i64(v // of_unit * PANEL))
            T.buffer_store(totals, code if v % of_unit == 0 else totals[unit] + code, [unit])
        sums = fold([totals[lanes(i64(u * PANEL))] for u in range(units)], lambda a, b: a + b)
        factor = vector.spread(T.int32(self.factor), units)
        first = block * i64(self.block // self.unit)
        T.buffer_store(self.sums, sums * factor, [i64(0), row, vector.at(first, units)])


def _inverse(peaks: Expr, count: int) -> Expr:
    """What makes each peak the largest code; zero for zero."""
    zero = vector.spread(T.float32(0), count)
    found = vector.spread(T.float32(_LIMIT), count) / peaks
    if count == 1:
        return T.if_then_else(peaks > zero, found, zero)
    return T.Select(peaks > zero, found, zero)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """bfloat16, as uint16: y `[1, T, K]`."""

    y: Expr
    block: int

    @classmethod
    def arguments(cls, count: Expr, features: int) -> Rounded:
        """Declares the kernel's next argument."""
        assert features % PANEL == 0, features
        block = 2 * PANEL if features % (2 * PANEL) == 0 else PANEL
        return cls(y=argument("y", (1, count, features), "uint16"), block=block)

    def store(self, row: Expr, block: Expr, values: Sequence[Expr]) -> None:
        """Rounds blocks."""
        for v, value in enumerate(values):
            at = block * i64(self.block) + i64(v * PANEL)
            T.buffer_store(self.y, from_float32(T.Bind(value)), [i64(0), row, lanes(at)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """act(gate) · up, the two halves of a product's outputs, on their way to an output.

    `avx512`: as precise as the output is, with that instruction set.
    """

    kind: str
    output: Output
    avx512: bool = False

    def __post_init__(self) -> None:
        check_activation(self.kind)

    @property
    def panels(self) -> int:
        """Panels of the gate that one block of the output is made of, and as many of up."""
        return self.output.block // PANEL

    def store(self, row: Expr, block: Expr, gates: Sequence[Expr], ups: Sequence[Expr]) -> None:
        """Stores as many blocks of a row as the panels of each make."""
        activate = ACTIVATIONS[self.kind]
        if self.avx512:
            activate = AVX512_ACTIVATIONS.get(self.kind, activate)
        values = registers(len(gates))
        for i, (gate, up) in enumerate(zip(gates, ups, strict=True)):
            put(values, i, activate(T.Bind(gate)) * up)
        self.output.store(row, block, [get(values, i) for i in range(len(gates))])


def check_activation(kind: str) -> None:
    """Raises UnsupportedError for an activation that no kernel computes."""
    if kind not in ACTIVATIONS:
        raise UnsupportedError(
            f"activation {kind!r}", hint=f"the CPU kernels know {', '.join(sorted(ACTIVATIONS))}"
        )


def rounded(value: Expr) -> Expr:
    """The nearest integers of float32x16 below 2^22, int32x16."""
    bits = T.reinterpret("int32x16", value + splat(WHOLE))
    return bits - T.broadcast(T.int32(WHOLE_BITS), PANEL)


def fold(vectors: Sequence[Expr], combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """What each of a power of two of vectors of 16 lanes folds to, as one vector (or number).

    Several fold in fewer steps than one after another: halves of two make one vector.
    """
    found, width = list(vectors), PANEL  # lanes that each given vector has left
    while len(found) > 1:
        width //= 2
        starts = range(0, 2 * PANEL, 2 * width)
        low = [start + i for start in starts for i in range(width)]
        pairs = zip(found[::2], found[1::2], strict=True)
        found = [
            T.Bind(combine(_shuffle([a, b], low), _shuffle([a, b], [i + width for i in low])))
            for a, b in pairs
        ]
    value, count = found[0], PANEL
    while width > 1:
        width //= 2
        low = [start + i for start in range(0, count, 2 * width) for i in range(width)]
        value = combine(_shuffle([value], low), _shuffle([value], [i + width for i in low]))
        value, count = T.Bind(value), count // 2
    return value


def _shuffle(vectors: list[Expr], places: list[int]) -> Expr:
    return tirx.Shuffle(vectors, [tirx.const(place, "int32") for place in places])
