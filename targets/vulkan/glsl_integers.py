"""When TIR's int64 may be printed as GLSL's int, and what has to be said otherwise then.

Indices and extents stay below 2³¹ (the runtime checks that), but not what TVM adds to them: to
divide a number that may be negative, it adds a multiple of the divisor near 2³¹ and subtracts the
quotient again.
"""

from __future__ import annotations

from typing import TypeAlias

import tvm

from llmc.targets.vulkan.glsl_types import dtype_of

Expr: TypeAlias = tvm.ir.Expr

FAR = 2**30  # constants so far from 0 may take an index out of 32 bits


class WideIntegers(Exception):
    """int64 holds more than 32 bits here: the kernel has to be printed with 64."""


def raised_dividend(expr: Expr) -> tuple[Expr, int, int] | None:
    """Of `(a + far) / b` or `% b`: a number, b and n so that it is floor(number / b) + n, or the
    floored remainder of that number. None where TVM did not raise the dividend.

    a + far is not negative, or truncating would not be what TVM wanted; far = n · b - rest with the
    smallest rest, which is subtracted and not added so that it does not overflow either.
    """
    a, b = expr.a, expr.b
    if dtype_of(expr) != "int64" or type(a).__name__ != "Add":
        return None
    if not (isinstance(a.b, tvm.tirx.IntImm) and isinstance(b, tvm.tirx.IntImm)):
        return None
    far, divisor = int(a.b.value), int(b.value)
    if far < FAR or not 0 < divisor < FAR:
        return None
    multiple = -(-far // divisor)
    rest = multiple * divisor - far
    return (a.a - tvm.tirx.IntImm("int64", rest) if rest else a.a), divisor, multiple
