"""Vulkan's cooperative matrices (VK_KHR_cooperative_matrix): 16 × 16 numbers of a subgroup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import f32, i64

Expr = Any
_SHAPE = (16, 16, 16)


def multiplies(fmt: WeightFormat) -> bool:
    """Whether float16 holds the weights: those of float32 and bfloat16 keep the plain kernels."""
    return fmt.float_dtype not in ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class CooperativeMatrices:
    """Implements llmc.targets.gpu.kernels.matrix_tile.MatrixUnit by TVM's fragments.

    float16 factors and float32 sums, the types and the shape that drivers have in common.
    """

    subgroup: int
    side: int = _SHAPE[0]

    def dtype(self, fmt: WeightFormat) -> str:
        """The type that weights of a format are multiplied in."""
        assert multiplies(fmt), fmt
        return "float16"

    def subgroup_of(self, thread: Expr) -> Expr:
        """The device says: Vulkan does not promise that its threads follow each other."""
        return T.Cast("int64", T.call_pure_extern("uint32", "gl_SubgroupID"))

    def left(self, count: int, dtype: str) -> Expr:
        """Room for so many left factors."""
        return self._room(count, dtype, "wmma.matrix_a")

    def right(self, count: int, dtype: str) -> Expr:
        """Room for right factors."""
        return self._room(count, dtype, "wmma.matrix_b")

    def sums(self, count: int) -> Expr:
        """Room for float32 sums."""
        return self._room(count, "float32", "wmma.accumulator")

    def _room(self, count: int, dtype: str, scope: str) -> Expr:
        return T.alloc_buffer([i64(count), i64(self.side**2)], dtype, scope=scope)

    def clear(self, sums: Expr, number: int) -> None:
        """Sets a matrix to zero."""
        T.evaluate(T.tvm_fill_fragment(sums.data, *_SHAPE, number, f32(0)))

    def load(self, matrices: Expr, number: int, tile: Expr, at: Expr) -> None:
        """Reads a square."""
        place = tile.access_ptr("r", offset=at)
        T.evaluate(
            T.tvm_load_matrix_sync(matrices.data, *_SHAPE, number, place, self.side, "row_major")
        )

    def multiply(self, sums: Expr, place: int, a: tuple[Expr, int], b: tuple[Expr, int]) -> None:
        """sums[place] += a · b."""
        factors = a[0].data, a[1], b[0].data, b[1]
        T.evaluate(T.tvm_mma_sync(sums.data, place, *factors, sums.data, place))

    def store(self, sums: Expr, number: int, out: Expr, at: Expr, stride: int) -> None:
        """Writes a matrix, its rows `stride` numbers apart."""
        place = out.access_ptr("w", offset=at)
        T.evaluate(T.tvm_store_matrix_sync(sums.data, *_SHAPE, number, place, stride, "row_major"))
