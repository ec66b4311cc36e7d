"""Vectors inside TVMScript kernels, and row loops that wake other threads only where that pays.

The IR's vectors have up to 16 float32 lanes; LLVM splits them where registers are narrower. Every
function here is called while a kernel is parsed: integers are compile-time constants, expressions
are the kernel's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tvm.script import tirx as T
from tvm.tirx import Buffer, Expr

LANES = 16

# A parallel loop costs several microseconds to start, in which one core touches about as many
# floats.
SERIAL_FLOATS = 16_384


def lanes_of(size: int) -> int:
    """The widest vector that walks `size` elements without a rest."""
    return math.gcd(size, LANES)


def at(start: Expr, lanes: int) -> Expr:
    """The index of `lanes` consecutive elements."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def spread(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def loader(
    buffer: Buffer, prefix: list[Expr | int], start: Expr | int = 0
) -> Callable[[Expr | int, int], Expr]:
    """load(i, lanes): the `lanes` elements from buffer[*prefix, start + i] on."""
    return lambda i, lanes: buffer[(*prefix, at(start + i, lanes))]


def convert(value: Expr, dtype: str) -> Expr:
    """Every lane as `dtype` (a scalar type's name)."""
    lanes = value.ty.dtype.lanes
    return T.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def registers(count: int, dtype: str = "float32") -> Buffer:
    """Accumulators: always on the stack, where LLVM turns them into registers.

    TVM would take more than 1 KiB from its workspace pool, which no register allocation reaches.
    """
    return T.alloc_buffer(
        (count,), dtype, scope="local", annotations={"disable_lower_builtin": True}
    )


def named(value: Expr) -> Expr:
    """An integer kept in a register of its own.

    A binding would not do: TVM's analysis puts the values of bindings in place of their names, and
    takes minutes over what becomes of a chain of divisions and choices.
    """
    register = registers(1, str(value.ty.dtype))
    T.buffer_store(register, value, [0])
    return register[0]


def is_serial(num_rows: Expr | int, row_floats: int) -> Expr | bool:
    """True where a loop over rows is too short for threads; a constant where the count is one."""
    return num_rows * row_floats <= SERIAL_FLOATS


@T.inline
def for_rows(num_rows, row_floats, body):
    """Runs the inline function `body(row)` for every row, in parallel where that pays."""
    if is_serial(num_rows, row_floats):
        for row in range(num_rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                body(row)
    else:
        for row in T.parallel(num_rows):
            with T.sblock("row"):
                T.reads()
                T.writes()
                body(row)
