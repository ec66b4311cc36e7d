"""Gated activations: the feed-forward layer's act(gate) · up, from one fused projection."""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from llmc.targets.cpu.kernels.outputs import ACTIVATIONS, check_activation
from llmc.targets.cpu.kernels.vector import at, for_rows, lanes_of


def gated_activation(
    *, inner: int, kind: str, gate_first: bool = True, tokens: int | None = None
) -> PrimFunc:
    """Computes y `[1, T, I]` = act(gate) · up of x `[1, T, 2I]`, both f32; buffers x, y.

    x holds gate then up along the features, or up then gate where `gate_first` is False. `kind` is
    silu, gelu, gelu_tanh or relu; anything else is an UnsupportedError.
    """
    check_activation(kind)
    activate = ACTIVATIONS[kind]
    lanes = lanes_of(inner)
    gate, up = (0, inner) if gate_first else (inner, 0)

    @T.prim_func(s_tir=True)
    def gated_activation(x_h: T.handle, y_h: T.handle):
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        t = T.int64()
        rows = T.meta_var(t if tokens is None else tokens)
        x = T.match_buffer(x_h, (1, rows, 2 * inner), "float32")
        y = T.match_buffer(y_h, (1, rows, inner), "float32")

        @T.inline
        def gate_row(row):
            for c in range(inner // lanes):
                y[0, row, at(c * lanes, lanes)] = (
                    activate(x[0, row, at(gate + c * lanes, lanes)])
                    * x[0, row, at(up + c * lanes, lanes)]
                )

        for_rows(rows, inner, gate_row)

    return gated_activation
