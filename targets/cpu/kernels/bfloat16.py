"""bfloat16 without the type: TVM rewrites bfloat16 expressions into float32 ones, so values are
kept as 16-bit integers (the upper half of a float32) and pairs of them as 32-bit integers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import with_llvm
from llmc.targets.cpu.kernels.vector import spread

Expr = Any
DOT_LANES = 16
# Of two vectors in a row, their lanes side by side.
PAIRS = [tirx.const(i + DOT_LANES * r, "int32") for i in range(DOT_LANES) for r in range(2)]
_DOT = "llmc_bfloat16_dot"
# The instruction as a function: an intrinsic with bfloat16 arguments cannot be called directly.
_DOT_LLVM = f"""
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define linkonce_odr <16 x float> @{_DOT}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b)
    alwaysinline {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float>
      @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
"""
_ROUND = "llmc_bfloat16_round"
_ROUND_LLVM = f"""
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define linkonce_odr <32 x i16> @{_ROUND}(<16 x float> %low, <16 x float> %high) alwaysinline {{
  %x = call <32 x bfloat>
      @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %r = bitcast <32 x bfloat> %x to <32 x i16>
  ret <32 x i16> %r
}}
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr <16 x i16> @{_ROUND}_one(<16 x float> %x) alwaysinline {{
  %y = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %r = bitcast <16 x bfloat> %y to <16 x i16>
  ret <16 x i16> %r
}}
"""


def typed(dtype: str, lanes: int) -> str:
    """The name of a vector type; a scalar's for one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def with_dot() -> AbstractContextManager[Any]:
    """A scope in which `dot` may be called."""
    return with_llvm(_DOT_LLVM)


def with_rounding() -> AbstractContextManager[Any]:
    """A scope in which `rounded`, `rounded_pairs` and `rounded_one` may be called."""
    return with_llvm(_ROUND_LLVM)


def dot(total: Expr, a: Expr, b: Expr) -> Expr:
    """total + a.low · b.low + a.high · b.high in each of 16 lanes; denormals count as zero."""
    return tirx.call_pure_extern(f"float32x{DOT_LANES}", _DOT, total, a, b)


def rounded(low: Expr, high: Expr) -> Expr:
    """Two vectors of 16 float32 in a row, rounded to nearest, as uint16; denormals become zero."""
    return tirx.call_pure_extern(f"uint16x{2 * DOT_LANES}", _ROUND, low, high)


def rounded_pairs(low: Expr, high: Expr) -> Expr:
    """The same as 16 pairs, int32."""
    shuffled = tirx.Shuffle([rounded(low, high)], PAIRS)
    return T.reinterpret(f"int32x{DOT_LANES}", shuffled)


def rounded_one(x: Expr) -> Expr:
    """One vector likewise."""
    return tirx.call_pure_extern(f"uint16x{DOT_LANES}", f"{_ROUND}_one", x)


def from_float32(x: Expr) -> Expr:
    """Float32 rounded to nearest, ties to even, as uint16."""
    lanes = x.ty.dtype.lanes

    def each(value: int) -> Expr:
        return spread(T.uint32(value), lanes)

    bits = T.reinterpret(typed("uint32", lanes), x)
    odd = T.bitwise_and(T.shift_right(bits, each(16)), each(1))
    return T.Cast(typed("uint16", lanes), T.shift_right(bits + each(0x7FFF) + odd, each(16)))


def halves(pairs: Expr) -> list[Expr]:
    """The two numbers of each int32, low half first, as float32."""
    lanes = pairs.ty.dtype.lanes
    low = T.shift_left(pairs, spread(T.int32(16), lanes))
    high = T.bitwise_and(pairs, spread(T.int32(-65536), lanes))
    return [T.reinterpret(typed("float32", lanes), half) for half in (low, high)]
