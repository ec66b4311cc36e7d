"""Gated activations: the feed-forward layer's act(gate) · up, from one fused projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from llmc.errors import UnsupportedError
from llmc.targets.building import argument, f32, i64, kernel, put, to_f32, when
from llmc.targets.gpu.kernels.block import launch, rows_of
from llmc.targets.gpu.parameters import GpuParameters

Expr = Any


def _silu(x: Expr) -> Expr:
    return x / (f32(1) + T.exp(f32(0) - x))


def _gelu(x: Expr) -> Expr:
    return f32(0.5) * x * (f32(1) + _erf(x * f32(2**-0.5)))


def _gelu_tanh(x: Expr) -> Expr:
    """tanh(u) is 1 - 2 / (exp(2u) + 1): no device has to have a good tanh for it."""
    inner = f32((2 / 3.141592653589793) ** 0.5) * (x + f32(0.044715) * x * x * x)
    return x - x / (T.exp(f32(2) * inner) + f32(1))


def _relu(x: Expr) -> Expr:
    return T.max(x, f32(0))


def _erf(x: Expr) -> Expr:
    """Error below 2e-7: Abramowitz and Stegun 7.1.28 has 3e-7, of which devices lack erf itself."""
    size = T.Bind(T.max(x, f32(0) - x))
    powers = (0.0705230784, 0.0422820123, 0.0092705272, 0.0001520143, 0.0002765672, 0.0000430638)
    total: Expr = f32(0)
    for coefficient in reversed(powers):
        total = (total + f32(coefficient)) * size
    base = T.Bind(f32(1) + total)
    square = T.Bind(base * base)
    fourth = T.Bind(square * square)
    eighth = T.Bind(fourth * fourth)
    value = T.Bind(f32(1) - f32(1) / (eighth * eighth))
    return T.Select(x < f32(0), f32(0) - value, value)


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
}


def gated_activation(
    *, inner: int, kind: str, tokens: int | None, dtype: str, params: GpuParameters
) -> PrimFunc:
    """Buffers x `[1, T, 2I]` = gate | up and y `[1, T, I]` = act(gate) · up, of `dtype`.

    `kind` is one of ACTIVATIONS; anything else is an UnsupportedError.
    """
    if kind not in ACTIVATIONS:
        raise UnsupportedError(
            f"activation {kind!r}", hint=f"the GPU kernels know {', '.join(sorted(ACTIVATIONS))}"
        )
    threads = params.flat_threads
    with kernel("gated_activation") as built:
        rows = rows_of(tokens)
        x = argument("x", (1, rows, 2 * inner), dtype)
        y = argument("y", (1, rows, inner), dtype)
        with launch((-(-inner // threads), rows), (threads,)) as (block, token, thread):
            column = T.Bind(block * i64(threads) + thread)
            with when(column < i64(inner)):
                gate = T.Bind(to_f32(x[i64(0), token, column]))
                up = to_f32(x[i64(0), token, column + i64(inner)])
                put(y, ACTIVATIONS[kind](gate) * up, 0, token, column)
    return built.func
