"""Metal's simdgroup matrices: 8 × 8 numbers, spread over a simdgroup's threads."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import f32, i64

Expr = Any


class SimdgroupMatrices:
    """Implements llmc.targets.gpu.kernels.matrix_tile.MatrixUnit by TVM's intrinsics.

    Weights of bfloat16 and float32 are multiplied as float32, because float16 would round them or
    lose their range.
    """

    side = 8
    subgroup = 32  # on every GPU of Apple's

    def dtype(self, fmt: WeightFormat) -> str:
        """The type that weights of a format are multiplied in."""
        return "float32" if fmt.float_dtype in ("float32", "bfloat16") else "float16"

    def subgroup_of(self, thread: Expr) -> Expr:
        """Threads of a simdgroup follow each other."""
        return T.floordiv(thread, i64(self.subgroup))

    def left(self, count: int, dtype: str) -> Expr:
        """Room for so many matrices."""
        return T.alloc_buffer([i64(count), i64(self.side**2)], dtype, scope="metal.simdgroup")

    right = left

    def sums(self, count: int) -> Expr:
        """Room for float32 sums."""
        return self.left(count, "float32")

    def clear(self, sums: Expr, number: int) -> None:
        """Sets a matrix to zero."""
        T.evaluate(
            T.metal.make_filled_simdgroup_matrix(sums.data, number, f32(0), self.side, self.side)
        )

    def load(self, matrices: Expr, number: int, tile: Expr, at: Expr) -> None:
        """Reads a square."""
        place = tile.access_ptr("r", offset=at)
        shape = self.side, self.side, self.side
        T.evaluate(T.metal.simdgroup_load(matrices.data, number, place, *shape, False))

    def multiply(self, sums: Expr, place: int, a: tuple[Expr, int], b: tuple[Expr, int]) -> None:
        """sums[place] += a · b."""
        factors = a[0].data, a[1], b[0].data, b[1]
        T.evaluate(
            T.metal.simdgroup_multiply_accumulate(sums.data, place, *factors, sums.data, place)
        )

    def store(self, sums: Expr, number: int, out: Expr, at: Expr, stride: int) -> None:
        """Writes a matrix, its rows `stride` numbers apart."""
        place = out.access_ptr("w", offset=at)
        shape = stride, self.side, self.side
        T.evaluate(T.metal.simdgroup_store(sums.data, number, place, *shape, False))
