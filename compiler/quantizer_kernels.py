"""The quantizer's inner loops as machine code for this machine: one pass where NumPy takes many.

A group is a row here: values `[N, n]` are N groups of n weights, and importance `[G, n]` weighs the
squared errors of row r by its row r % G. Scales and minimums are one a group. All arrays are
float32 and contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from llmc.errors import UsageError
from llmc.targets.cpu.kernels.math import lane_max, lane_sum
from llmc.targets.registry import open_target

Expr = Any

_LANES = 16
_CHAINS = 2
"""Vectors of partial sums, so that one addition need not wait for another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """Whole numbers from lowest to highest, or those of e4m3 between them.

    They are stored as `dtype`, with `zero_point` added.
    """

    lowest: int
    highest: int
    e4m3: bool
    zero_point: int
    dtype: str

    def nearest(self, value: Expr) -> Expr:
        """Of a number, or of each of a vector's."""
        code = tirx.min(tirx.max(value, _like(self.lowest, value)), _like(self.highest, value))
        return _nearest_e4m3(code) if self.e4m3 else tirx.nearbyint(code)


@cache
def kernels(codes: Codes) -> Any:  # noqa: ANN401 - a module of TVM's
    """Functions by name: arguments are values and importance, then what each says.

    extremes  out `[3, N]`: largest value, largest of all negated, how many are no finite numbers
    errors    scales, mins, out `[N, C]`: squared errors of C candidates
    moments   scales, mins `[N]`, out `[4, N]`: sums of code², value · code, code and value, weighed
    nearest   scales, mins `[N]`, out `[N, n]` of codes.dtype: codes as they are stored
    values    scales, mins `[N]`, out `[N, n]`: what these stand for
    """
    made = {
        "extremes": _extremes(),
        "errors": _errors(codes),
        "moments": _moments(codes),
        "nearest": _each(
            codes,
            codes.dtype,
            lambda grid, value: _cast(
                codes.dtype, grid.code(value) + _like(float(codes.zero_point), value)
            ),
        ),
        "values": _each(codes, "float32", lambda grid, value: grid.value(grid.code(value))),
    }
    named = {name: func.with_attr("global_symbol", name) for name, func in made.items()}
    try:
        target = open_target("cpu").tvm_target
    except UsageError:  # a CPU that no model is compiled for
        target = tvm.target.Target("llvm")
    # TVM's storage rewriting would move the sums out of registers.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        return tvm.compile(tvm.IRModule(named), target=target)


class _Groups:
    """The arguments that all kernels begin with."""

    def __init__(self) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        self.rows, self.size, self.periods = (tirx.Var(n, "int64") for n in ("N", "n", "G"))
        self.values = self.array("values", self.rows, self.size)
        self.importance = self.array("importance", self.periods, self.size)

    def array(self, name: str, *shape: Expr, dtype: str = "float32") -> Expr:
        """Declares the next argument."""
        return T.arg(name, T.Buffer(shape, dtype))

    def each(self, lanes: int, body: Callable[[Expr], None]) -> None:
        """`body` with the index of every vector of a group, and of what is left over."""
        with T.serial(self.size // lanes) as block:
            body(T.ramp(block * lanes, 1, lanes))
        with T.serial(self.size % lanes) as rest:
            body(self.size // lanes * lanes + rest)


class _Grid:
    """A group's scale and minimum."""

    def __init__(self, codes: Codes, scale: Expr, minimum: Expr) -> None:
        self._codes = codes
        # In registers: LLVM cannot know that nobody changes them in memory.
        self._held = _registers(3)
        T.buffer_store(self._held, scale, [0])
        inverse = tirx.if_then_else(scale == T.float32(0), T.float32(0), T.float32(1) / scale)
        T.buffer_store(self._held, inverse, [1])
        T.buffer_store(self._held, minimum, [2])

    def code(self, value: Expr) -> Expr:
        """The nearest code of a value."""
        above = value - _like(self._held[2], value)
        return self._codes.nearest(above * _like(self._held[1], value))

    def value(self, code: Expr) -> Expr:
        """What a code stands for."""
        return code * _like(self._held[0], code) + _like(self._held[2], code)


@dataclass(frozen=True, slots=True)
class _Fold:
    """How many numbers become one."""

    start: Expr
    combine: Callable[[Expr, Expr], Expr]
    lanes: Callable[[Expr], Expr]


_SUM = _Fold(T.float32(0), lambda a, b: a + b, lane_sum)
_LARGEST = _Fold(tirx.min_value("float32"), tirx.max, lane_max)


def _extremes() -> tirx.PrimFunc:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("extremes")
        groups = _Groups()
        out = groups.array("out", tirx.IntImm("int64", 3), groups.rows)
        with T.serial(groups.rows) as row:
            largest = tirx.max_value("float32")

            def terms(value: Expr, _: Expr) -> list[Expr]:
                finite = tirx.abs(value) <= _like(largest, value)
                return [value, -value, tirx.Select(finite, _like(0.0, value), _like(1.0, value))]

            folded = _folded(groups, row, [_LARGEST, _LARGEST, _SUM], terms)
            for index, number in enumerate(folded):
                T.buffer_store(out, number, [index, row])
    return builder.get()


def _errors(codes: Codes) -> tirx.PrimFunc:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("errors")
        groups = _Groups()
        count = tirx.Var("C", "int64")
        scales, mins, out = (
            groups.array(name, groups.rows, count) for name in ("scales", "mins", "out")
        )
        with T.grid(groups.rows, count) as (row, candidate):
            grid = _Grid(codes, scales[row, candidate], mins[row, candidate])

            def squared(value: Expr, weight: Expr) -> list[Expr]:
                off = grid.value(grid.code(value)) - value
                return [off * off * weight]

            [total] = _folded(groups, row, [_SUM], squared)
            T.buffer_store(out, total, [row, candidate])
    return builder.get()


def _moments(codes: Codes) -> tirx.PrimFunc:
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("moments")
        groups = _Groups()
        scales, mins = (groups.array(name, groups.rows) for name in ("scales", "mins"))
        out = groups.array("out", tirx.IntImm("int64", 4), groups.rows)
        with T.serial(groups.rows) as row:
            grid = _Grid(codes, scales[row], mins[row])

            def terms(value: Expr, weight: Expr) -> list[Expr]:
                code = grid.code(value)
                weighed = code * weight
                return [code * weighed, value * weighed, weighed, value * weight]

            for index, total in enumerate(_folded(groups, row, [_SUM] * 4, terms)):
                T.buffer_store(out, total, [index, row])
    return builder.get()


def _each(codes: Codes, dtype: str, result: Callable[[_Grid, Expr], Expr]) -> tirx.PrimFunc:
    """A kernel of one `result` for each value."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("each")
        groups = _Groups()
        scales, mins = (groups.array(name, groups.rows) for name in ("scales", "mins"))
        out = groups.array("out", groups.rows, groups.size, dtype=dtype)
        with T.serial(groups.rows) as row:
            grid = _Grid(codes, scales[row], mins[row])

            def store(at: Expr) -> None:
                T.buffer_store(out, result(grid, groups.values[row, at]), [row, at])

            groups.each(_LANES, store)
    return builder.get()


def _folded(
    groups: _Groups, row: Expr, folds: list[_Fold], terms: Callable[[Expr, Expr], list[Expr]]
) -> list[Expr]:
    """What each fold makes of a group's terms; these come of a value and its weight."""
    step = _CHAINS * _LANES
    period = _registers(1, "int64")
    T.buffer_store(period, row % groups.periods, [0])
    held = _registers(len(folds) * step)
    places = [
        [T.ramp((index * _CHAINS + chain) * _LANES, 1, _LANES) for chain in range(_CHAINS)]
        for index in range(len(folds))
    ]
    for fold, chains in zip(folds, places, strict=True):
        for place in chains:
            T.buffer_store(held, T.broadcast(fold.start, _LANES), [place])

    def add(at: Expr, chain: int, lanes: int) -> None:
        weight = groups.importance[period[0], at]
        for index, term in enumerate(terms(groups.values[row, at], weight)):
            place = places[index][chain] if lanes > 1 else index * step
            T.buffer_store(held, folds[index].combine(held[place], term), [place])

    with T.serial(groups.size // step) as block:
        for chain in range(_CHAINS):
            add(T.ramp(block * step + chain * _LANES, 1, _LANES), chain, _LANES)
    with T.serial(groups.size % step) as rest:
        add(groups.size // step * step + rest, 0, 1)
    return [
        fold.lanes(reduce(fold.combine, [held[place] for place in chains]))
        for fold, chains in zip(folds, places, strict=True)
    ]


def _registers(count: int, dtype: str = "float32") -> Expr:
    """Numbers on the stack, where LLVM makes registers of them."""
    return T.alloc_buffer(
        (count,), dtype, scope="local", annotations={"disable_lower_builtin": True}
    )


def _nearest_e4m3(code: Expr) -> Expr:
    """Three bits of mantissa, ties to even; steps of 2^-9 below 2^-6."""
    lanes = code.ty.dtype.lanes
    int32 = "int32" if lanes == 1 else f"int32x{lanes}"
    bits = tirx.reinterpret(int32, code)
    odd = tirx.bitwise_and(tirx.shift_right(bits, _like(20, bits)), _like(1, bits))
    rounded = tirx.bitwise_and(bits + odd + _like((1 << 19) - 1, bits), _like(-1 << 20, bits))
    small = tirx.nearbyint(code * _like(512.0, code)) * _like(1 / 512, code)
    is_small = tirx.abs(code) < _like(2.0**-6, code)
    return tirx.Select(is_small, small, tirx.reinterpret(code.ty, rounded))


def _cast(dtype: str, value: Expr) -> Expr:
    lanes = value.ty.dtype.lanes
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def _like(number: Expr | float, value: Expr) -> Expr:
    """A number of the type and with the lanes of `value`."""
    dtype = value.ty.dtype
    if isinstance(number, int | float):
        number = tirx.const(number, "int32" if "int" in str(dtype) else "float32")
    return number if dtype.lanes == 1 else T.broadcast(number, dtype.lanes)
