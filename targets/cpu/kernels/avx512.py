"""Functions that are cheap with AVX-512, for values that are rounded to 8 bits afterwards.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.cpu.kernels.panels import F32X16, splat

Expr = Any
# Minimax for 2^f on [0, 1], 1 at 0: error 9e-5, where bfloat16 rounds by 2e-3.
_POWER = (0.0770672, 0.22764482, 0.69511682, 1.0)
_ROUND_DOWN, _CURRENT_MODE = 1, 4
_LOG2_E = 1.44269504088896341
_HIGHEST = 126.0


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
