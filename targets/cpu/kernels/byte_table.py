"""Code books: words of codes of four bits become what sixteen bytes of a table say.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.layout import PANEL

Expr = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTable:
    """How an instruction set looks bytes up: `intrinsic` is LLVM's, of a table and a vector of
    `words` words whose bytes are below 16; each 16 bytes have the same table.
    """

    intrinsic: str
    words: int

    def lookup(self, table: Sequence[int], codes: Expr) -> Expr:
        """table[code] for every byte of codes int32x16; entries of 0 … 255."""
        return self._part(table, codes, PANEL)

    def _part(self, table: Sequence[int], codes: Expr, count: int) -> Expr:
        dtype = f"int32x{count}"
        if count > self.words:
            half = f"int32x{count // 2}"
            parts = (T.vectorlow(half, codes), T.vectorhigh(half, codes))
            return T.vectorcombine(dtype, *(self._part(table, p, count // 2) for p in parts))
        entries = tirx.Shuffle(
            [T.int32(w) for w in _words(table)] * (count // 4), list(range(count))
        )
        bytes_ = f"int8x{4 * count}"
        operands = (T.reinterpret(bytes_, entries), T.reinterpret(bytes_, codes))
        return T.reinterpret(dtype, T.call_llvm_pure_intrin(bytes_, self.intrinsic, *operands))


def lookup_scalar(table: Sequence[int], codes: Expr) -> Expr:
    """The same for one word, in plain shifts: for a row of an embedding."""
    halves = [
        T.int64(int.from_bytes(bytes(table[i : i + 8]), "little", signed=True)) for i in (0, 8)
    ]
    total: Expr = T.int32(0)
    for byte in range(4):
        code = T.bitwise_and(T.shift_right(codes, T.int32(8 * byte)), T.int32(15))
        half = T.Select(code < T.int32(8), *halves)
        shift = T.Cast("int64", T.bitwise_and(code, T.int32(7)) * T.int32(8))
        value = T.bitwise_and(T.Cast("int32", T.shift_right(half, shift)), T.int32(255))
        total = T.bitwise_or(total, T.shift_left(value, T.int32(8 * byte)))
    return total


def _words(table: Sequence[int]) -> list[int]:
    """The sixteen bytes as signed words."""
    data = bytes(table)
    return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, 16, 4)]


PSHUFB_512 = ByteTable(intrinsic="llvm.x86.avx512.pshuf.b.512", words=16)
PSHUFB_256 = ByteTable(intrinsic="llvm.x86.avx2.pshuf.b", words=8)
TBL = ByteTable(intrinsic="llvm.aarch64.neon.tbl1.v16i8", words=4)
