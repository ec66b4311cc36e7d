"""A row of logits, read as vectors.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64, vector_type
from llmc.targets.cpu.kernels.vector import LANES, at, spread

Expr = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsVector:
    """Neighbouring logits of a row: the last vector begins early enough to end with the row."""

    number: Expr  # from the first one that was asked for
    value: Expr  # float32
    columns: Expr  # int32
    begin: Expr  # the first column that no vector before has


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """Row `source` of the buffer `[L, V]` float32."""

    buffer: Expr
    source: Expr

    @property
    def width(self) -> int:
        """Logits of a vector."""
        return width_of(int(self.buffer.ty.shape[1]))

    @contextmanager
    def vectors(self, first: Expr, count: int) -> Iterator[LogitsVector]:
        """A loop over the vectors of `count` logits from column `first` on, or of those there are.

        `count` is a multiple of the width.
        """
        vocab_size, width = int(self.buffer.ty.shape[1]), self.width
        rest = T.floordiv(i64(vocab_size + width - 1) - first, i64(width))
        with T.serial(T.Bind(T.min(i64(count // width), rest))) as number:
            column = T.Bind(first + number * i64(width))
            start = T.Bind(T.min(column, i64(vocab_size - width)))
            value = T.Bind(self.buffer[self.source, at(start, width)])
            columns = at(T.Cast("int32", start), width)
            yield LogitsVector(number=number, value=value, columns=columns, begin=column)


def width_of(vocab_size: int) -> int:
    """Logits of a vector: a power of two that the row has."""
    return int(min(LANES, 1 << (vocab_size.bit_length() - 1)))


def fold_integers(kind: str, value: Expr) -> Expr:
    """The lanes of a vector of int32 brought together, by LLVM's name ("smax", "smin", "add")."""
    lanes = int(value.ty.dtype.lanes)
    if lanes == 1:
        return value
    return T.call_llvm_pure_intrin("int32", f"llvm.vector.reduce.{kind}.v{lanes}i32", value)


@dataclass(frozen=True, slots=True)
class Carried:
    """A vector that a loop carries."""

    buffer: Expr
    width: int

    @classmethod
    def of(cls, value: Expr) -> Carried:
        """One that begins with `value`."""
        width, dtype = int(value.ty.dtype.lanes), str(value.ty.dtype).split("x")[0]
        buffer = T.alloc_buffer(
            [i64(width)], dtype, scope="local", annotations={"disable_lower_builtin": True}
        )
        carried = cls(buffer, width)
        carried.set(value)
        return carried

    def get(self) -> Expr:
        """What it is now."""
        return self.buffer[at(i64(0), self.width)]

    def set(self, value: Expr) -> None:
        """Changes it."""
        T.buffer_store(self.buffer, value, [at(i64(0), self.width)])


def integers(value: int, width: int) -> Expr:
    """`value` as int32 in every lane."""
    return spread(T.int32(value), width)


def bits_of(value: Expr) -> Expr:
    """Float32 numbers as the integers that have their bits."""
    return T.reinterpret(vector_type("int32", int(value.ty.dtype.lanes)), value)
