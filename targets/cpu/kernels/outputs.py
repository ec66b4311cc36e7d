"""Where a kernel's results go that the next product takes narrow: bytes with scales, or bfloat16.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.errors import UnsupportedError
from llmc.targets.cpu.kernels import avx512
from llmc.targets.cpu.kernels.bfloat16 import from_float32
from llmc.targets.cpu.kernels.math import gelu, gelu_tanh, lane_max, relu, silu
from llmc.targets.cpu.kernels.panels import argument, get, i64, lanes, put, registers, splat
from llmc.targets.cpu.layout import PANEL

Expr = Any
ACTIVATIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
AVX512_ACTIVATIONS = {"silu": avx512.silu}
_LIMIT = 127.0
INTEGER_OFFSET = 12582912.0
"""Added to a float32 of small magnitude, it leaves the nearest integer in the low mantissa bits."""
INTEGER_BITS = 0x4B400000
"""What the other bits are then."""


class Output(Protocol):
    """Rows of features, stored `block` (a multiple of 16) of them at a time."""

    @property
    def block(self) -> int:
        """Features that are stored together."""

    def store(self, row: Expr, block: Expr, values: Sequence[Expr]) -> None:
        """Stores features block · `block` … of a row, sixteen a vector (float32)."""


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
        """Rounds a block."""
        values = [T.Bind(v) for v in values]
        largest = registers(1)
        put(largest, 0, splat(0.0))
        for value in values:
            put(largest, 0, T.max(get(largest, 0), T.max(value, splat(0.0) - value)))
        peak = T.Bind(lane_max(get(largest, 0)))
        T.buffer_store(self.scales, peak * T.float32(1 / _LIMIT), [i64(0), row, block])
        inverse = T.Bind(
            T.if_then_else(peak > T.float32(0), T.float32(_LIMIT) / peak, T.float32(0))
        )
        of_unit = self.unit // PANEL
        for u in range(self.block // self.unit):
            total = T.broadcast(T.int32(0), PANEL)
            for v in range(u * of_unit, (u + 1) * of_unit):
                shifted = values[v] * T.broadcast(inverse, PANEL) + splat(INTEGER_OFFSET)
                code = T.Bind(
                    T.reinterpret("int32x16", shifted) - T.broadcast(T.int32(INTEGER_BITS), PANEL)
                )
                at = block * i64(self.block) + i64(v * PANEL)
                T.buffer_store(self.codes, T.Cast("int8x16", code), [i64(0), row, lanes(at)])
                total = T.Bind(total + code)
            units = i64(self.block // self.unit)
            at = [i64(0), row, block * units + i64(u)]
            T.buffer_store(self.sums, T.int32(self.factor) * lane_sum(total), at)


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
        """Rounds a block."""
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
        """Stores a block of a row."""
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


def lane_sum(vector: Expr) -> Expr:
    """The sum of 16 int32."""
    return tirx.call_llvm_pure_intrin("int32", "llvm.vector.reduce.add.v16i32", vector)
