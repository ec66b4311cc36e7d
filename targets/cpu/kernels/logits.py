"""A row of logits, read as vectors.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64, lanes_of, on_stack, vector_type
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
    def vocab_size(self) -> int:
        """Logits of the row."""
        return int(self.buffer.ty.shape[1])

    @property
    def width(self) -> int:
        """Logits of a vector: a power of two that the row has."""
        return int(min(LANES, 1 << (self.vocab_size.bit_length() - 1)))

    @contextmanager
    def vectors(self, first: Expr, count: int) -> Iterator[LogitsVector]:
        """A loop over the vectors of `count` logits from column `first` on, or of those there are.

        `count` is a multiple of the width.
        """
        vocab_size, width = self.vocab_size, self.width
        rest = T.floordiv(i64(vocab_size + width - 1) - first, i64(width))
        with T.serial(T.Bind(T.min(i64(count // width), rest))) as number:
            column = T.Bind(first + number * i64(width))
            start = T.Bind(T.min(column, i64(vocab_size - width)))
            value = T.Bind(self.buffer[self.source, at(start, width)])
            columns = at(T.Cast("int32", start), width)
            yield LogitsVector(number=number, value=value, columns=columns, begin=column)


@dataclass(frozen=True, slots=True)
class Carried:
    """A vector that a loop carries."""

    buffer: Expr
    width: int

    @classmethod
    def of(cls, value: Expr) -> Carried:
        """One that begins with `value`."""
        width = lanes_of(value)
        carried = cls(on_stack((width,), str(value.ty.dtype).split("x")[0]), width)
        carried.set(value)
        return carried

    def get(self) -> Expr:
        """What it is now."""
        return self.buffer[at(i64(0), self.width)]

    def set(self, value: Expr) -> None:
        """Changes it."""
        T.buffer_store(self.buffer, value, [at(i64(0), self.width)])


def lowest(width: int) -> Expr:
    """Minus infinity in every lane."""
    return spread(T.reinterpret("float32", T.int32(-1 << 23)), width)


def integers(value: int, width: int) -> Expr:
    """`value` as int32 in every lane."""
    return spread(T.int32(value), width)


def bits_of(value: Expr) -> Expr:
    """Float32 numbers as the integers that have their bits."""
    return T.reinterpret(vector_type("int32", lanes_of(value)), value)
