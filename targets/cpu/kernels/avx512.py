"""What AVX-512 has instructions for: approximations, 16-bit numbers and gathering.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.targets.building import with_llvm
from llmc.targets.cpu.kernels.panels import F32X16, splat
from llmc.targets.cpu.layout import PANEL

Expr = Any
HALVES = 2 * PANEL
"""16-bit numbers of a vector."""
INT16 = f"int16x{HALVES}"
UINT16 = f"uint16x{HALVES}"
INT8 = f"int8x{4 * PANEL}"
# Minimax for 2^f on [0, 1], 1 at 0: error 9e-5, where bfloat16 rounds by 2e-3.
_POWER = (0.0770672, 0.22764482, 0.69511682, 1.0)
_ROUND_DOWN, _CURRENT_MODE = 1, 4
_LOG2_E = 1.44269504088896341
_HIGHEST = 126.0
_ADD_PRODUCT = "llmc_add_product"
_ADD_PRODUCT_LLVM = f"""
define linkonce_odr <16 x float> @{_ADD_PRODUCT}(<16 x float> %total, <16 x float> %a, ptr %b)
    alwaysinline {{
  %r = call <16 x float> asm "vfmadd231ps $2{{1to16}}, $1, $0", "=v,v,*m,0"
      (<16 x float> %a, ptr elementtype(float) %b, <16 x float> %total)
  ret <16 x float> %r
}}
"""


def power_of_two(x: Expr) -> Expr:
    """2^x, float32x16; exactly 0 for -inf."""
    fraction = T.Bind(_masked("reduce", x, T.int32(_ROUND_DOWN), splat(0.0)))
    value = splat(_POWER[0])
    for coefficient in _POWER[1:]:
        value = value * fraction + splat(coefficient)
    return _masked("scalef", value, x, splat(0.0))


def silu(x: Expr) -> Expr:
    """x / (1 + e^-x) within 2^-12, float32x16."""
    x = T.Bind(x)
    exponent = T.min(x * splat(-_LOG2_E), splat(_HIGHEST))
    divisor = T.Bind(splat(1.0) + power_of_two(T.Bind(exponent)))
    # Of a divisor up to 2^126 the estimate is a normal number.
    return x * T.call_llvm_pure_intrin(
        F32X16, "llvm.x86.avx512.rcp14.ps.512", divisor, splat(0.0), T.uint16(0xFFFF)
    )


def _masked(name: str, *operands: Expr) -> Expr:
    """An instruction on all lanes."""
    return T.call_llvm_pure_intrin(
        F32X16,
        f"llvm.x86.avx512.mask.{name}.ps.512",
        *operands,
        T.uint16(0xFFFF),
        T.int32(_CURRENT_MODE),
    )


def scale_halves(value: Expr, factor: Expr) -> Expr:
    """value · factor / 2^15, rounded, int16x32."""
    return T.call_llvm_pure_intrin(INT16, "llvm.x86.avx512.pmul.hr.sw.512", value, factor)


def multiply_add_bytes(unsigned: Expr, signed: Expr) -> Expr:
    """Products of unsigned and signed bytes, INT8, two neighbours added up, int16x32."""
    return T.call_llvm_pure_intrin(INT16, "llvm.x86.avx512.pmaddubs.w.512", unsigned, signed)


def upper_bytes(even: Expr, odd: Expr) -> Expr:
    """The upper bytes of 16-bit numbers, int32x16: even ones become each half's lower byte."""
    even, odd = (T.reinterpret(UINT16, part) for part in (even, odd))
    even = T.shift_right(even, T.broadcast(T.uint16(8), HALVES))
    odd = T.bitwise_and(odd, T.broadcast(T.uint16(0xFF00), HALVES))
    return T.reinterpret("int32x16", T.bitwise_or(even, odd))


def with_products() -> AbstractContextManager[Any]:
    """A scope in which `add_product` may be called."""
    return with_llvm(_ADD_PRODUCT_LLVM)


def add_product(total: Expr, a: Expr, b: Expr) -> Expr:
    """total + a · b, float32x16, rounded once; `b` is an element of a buffer.

    The total stays where it is: LLVM writes it over `a`, so that totals go round all registers, and
    constants have to leave theirs.
    """
    return tirx.call_extern(F32X16, _ADD_PRODUCT, total, a, T.address_of(b))


def gather(dtype: str, kind: str, first: Expr, places: Expr) -> Expr:
    """Sixteen numbers of 32 bits, at these places from the one whose value is `first`."""
    every = T.broadcast(tirx.const(True, "bool"), PANEL)
    nothing = T.broadcast(tirx.const(0, dtype.removesuffix("x16")), PANEL)
    name = f"llvm.x86.avx512.mask.gather.{kind}.512"
    address = T.address_of(first)
    return T.Bind(T.call_llvm_intrin(dtype, name, nothing, address, places, every, T.int32(4)))
