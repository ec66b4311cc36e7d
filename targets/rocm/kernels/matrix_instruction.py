"""The instructions that multiply matrices of 16 rows and columns, as data.

All threads of a wavefront take part. A lane holds some features of one row of A and of one column
of B, which lie alike in its registers, and some rows of one column of the product:

    MFMA (CDNA)   64 lanes; four features, 4 · (lane / 16) and on; rows 4 · (lane / 16) + output
    WMMA (RDNA 3) 32 lanes; all 16 features, the same in both halves; rows 2 · output + lane / 16

as AMD's manuals of the instruction sets describe them ("Matrix Arithmetic Instructions" of CDNA 3,
"Wave Matrix Multiply Accumulate" of RDNA 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64

Expr = Any
SIDE = 16
"""Rows, columns and features of an instruction's matrices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixInstruction:
    """How a wavefront's registers hold the matrices; the functions take numbers or expressions."""

    wavefront: int
    lane_features: int  # of a row or a column that a lane holds
    outputs: int  # of a lane
    output_stride: int  # rows from a lane's output to its next one
    group_stride: int  # rows from a lane's output to that of the lane 16 further on
    float16: str  # LLVM's names of the intrinsics
    bfloat16: str
    flags: int  # zeros that the intrinsics take behind the matrices

    @property
    def groups(self) -> int:
        """Lanes that hold different features of the same row."""
        return SIDE // self.lane_features

    def line(self, lane: Expr) -> Expr:
        """The row of A, the column of B and of the product, that a lane holds."""
        return lane % SIDE

    def group(self, lane: Expr) -> Expr:
        """Which of its row's features a lane holds: `lane_features` each."""
        return lane // SIDE % self.groups

    def output_row(self, lane: Expr, output: int) -> Expr:
        """The row of the product that an output of a lane is."""
        return lane // SIDE * self.group_stride + output * self.output_stride

    def multiply(self, dtype: str, a: Expr, b: Expr, sums: Expr, at: tuple[Expr, ...]) -> None:
        """Emits sums[at] += A · B.

        a and b are int32 vectors of pairs of `dtype` (float16, bfloat16), even features in the low
        halves; sums has float32 registers, `outputs` of them at `at`.
        """
        name, lanes = (self.float16, "float16") if dtype == "float16" else (self.bfloat16, "int16")
        operands = [T.reinterpret(f"{lanes}x{self.lane_features}", words) for words in (a, b)]
        place = (*at, T.ramp(i64(0), i64(1), self.outputs))
        flags = [T.int32(0)] * self.flags
        result = T.call_llvm_pure_intrin(
            f"float32x{self.outputs}", name, *operands, sums[place], *flags
        )
        T.buffer_store(sums, result, list(place))


MFMA = MatrixInstruction(
    wavefront=64,
    lane_features=4,
    outputs=4,
    output_stride=1,
    group_stride=4,
    float16="llvm.amdgcn.mfma.f32.16x16x16f16",
    bfloat16="llvm.amdgcn.mfma.f32.16x16x16bf16.1k",
    flags=3,
)
WMMA = MatrixInstruction(
    wavefront=32,
    lane_features=16,
    outputs=8,
    output_stride=2,
    group_stride=1,
    float16="llvm.amdgcn.wmma.f32.16x16x16.f16",
    bfloat16="llvm.amdgcn.wmma.f32.16x16x16.bf16",
    flags=0,
)
