"""Kernels under construction: what they are made of on every kind of device.

Everything here runs while an IRBuilder frame is open: Python loops become straight code, `T.serial`
a loop. Indices are int64, so that no weight or cache is too large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

Expr = Any
Extent = int | Expr


def i64(value: int) -> Expr:
    """An int64 constant."""
    return tirx.IntImm("int64", value)


def index(value: Extent) -> Expr:
    """An extent or an index as an expression."""
    return i64(value) if isinstance(value, int) else value


def f32(value: float) -> Expr:
    """A float32 constant, rounded here: generators print more digits than a float has."""
    return T.float32(float(np.float32(value)))


def to_f32(value: Expr) -> Expr:
    """Any number as float32: what all sums are made in."""
    return T.Cast("float32", value)


def lanes_of(value: Expr) -> int:
    """Numbers that an expression is a vector of; 1 for one by itself."""
    return int(value.ty.dtype.lanes)


def vector_type(dtype: str, lanes: int) -> str:
    """The type of so many numbers."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def splat_like(vector: Expr, value: float) -> Expr:
    """`value` as float32 in as many lanes as `vector` has."""
    lanes = lanes_of(vector)
    return f32(value) if lanes == 1 else T.broadcast(f32(value), lanes)


def on_stack(shape: tuple[int, ...], dtype: str = "float32") -> Expr:
    """A buffer on the stack, or in registers where LLVM finds that it can: no call for memory."""
    dims = [i64(extent) for extent in shape]
    annotations = {"disable_lower_builtin": True}
    return T.alloc_buffer(dims, dtype, scope="local", annotations=annotations)


def with_llvm(functions: str) -> AbstractContextManager[Any]:
    """A scope in which functions may be called that are written in LLVM's language."""
    code = tvm.ir.StringImm(functions)
    scope: AbstractContextManager[Any] = T.attr(i64(0), "pragma_import_llvm", code)
    return scope


def size_var(name: str) -> Expr:
    """A symbolic dimension."""
    return tirx.Var(name, "int64")


class Building:
    """A kernel under construction; `func` is there once the frame is closed."""

    func: tvm.tirx.PrimFunc


@contextmanager
def kernel(name: str) -> Iterator[Building]:
    """Opens a PrimFunc; its arguments, then its launches follow inside."""
    building = Building()
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        yield building
    building.func = builder.get()


def argument(name: str, shape: tuple[Extent, ...], dtype: str = "float32") -> Expr:
    """Declares the kernel's next buffer argument."""
    return T.arg(name, T.Buffer([index(d) for d in shape], dtype))


def registers(shape: tuple[int, ...], dtype: str = "float32") -> Expr:
    """Memory of one thread: registers where every index is a constant once loops are unrolled."""
    return T.alloc_buffer([i64(d) for d in shape], dtype, scope="local")


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Only where the condition holds."""
    with T.If(condition), T.Then():
        yield


def put(buffer: Expr, value: Expr, *indices: Extent) -> None:
    """Stores a value in the buffer's own type."""
    dtype = str(buffer.ty.dtype)
    if str(value.ty.dtype) != dtype:
        value = T.Cast(dtype, value)
    T.buffer_store(buffer, value, [index(i) for i in indices])
