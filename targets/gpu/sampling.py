"""Choosing tokens on the device: the functions that an artifact has beside its entry points.

    choose_largest(logits [L, V] f32, rows [R] i32) -> token_ids [R] i32
    choose_drawn(logits [L, V] f32, rows [R] i32, top_k [R] i32, settings [R, 5] f32)
        -> token_ids [R] i32
    choose_limited, of the same signature

`rows` are the rows of the logits to choose from. A token id of -1 stands for a row whose largest
logit is no finite number. docs/artifact.md has the meaning of top_k and settings. Only
choose_limited heeds top_k (but for 1, the largest) and top_p: the search that they take is most of
the launches.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from llmc.targets.base import Sampling
from llmc.targets.gpu.kernels.argmax import argmax_merge, argmax_parts
from llmc.targets.gpu.kernels.draw import draw, draw_parts
from llmc.targets.gpu.kernels.token_limits import (
    BINS,
    FLOATS,
    INTEGERS,
    NUM_PASSES,
    SETTINGS,
    limits_begin,
    limits_histogram,
    limits_narrow,
)
from llmc.targets.gpu.layout import ceildiv
from llmc.targets.gpu.parameters import GpuParameters

Expr = Any


def sampling(vocab_size: int, params: GpuParameters) -> Sampling:
    """Both functions with their kernels."""
    return Sampling(rule="gpu.sampling", module=_Functions(vocab_size, params).build())


class _Functions:
    """Builds the module, one Relax function after the other."""

    def __init__(self, vocab_size: int, params: GpuParameters) -> None:
        self.vocab_size = vocab_size
        self.parts = ceildiv(vocab_size, params.sampling.part)
        self.params = params
        self.builder = relax.BlockBuilder()
        self.rows = tvm.tirx.Var("R", "int64")

    def build(self) -> tvm.IRModule:
        """The module."""
        self._choose_largest()
        self._choose_drawn("choose_drawn", 0)
        self._choose_drawn("choose_limited", NUM_PASSES)
        return self.builder.get()

    def _choose_largest(self) -> None:
        logits, rows = self._inputs()
        with self.builder.function("choose_largest", [logits, rows]):
            self.builder.emit_func_output(self._largest(logits, rows))

    def _choose_drawn(self, name: str, num_passes: int) -> None:
        logits, rows = self._inputs()
        top_k = relax.Var("top_k", self._integers())
        settings = relax.Var("settings", self._floats(SETTINGS))
        with self.builder.function(name, [logits, rows, top_k, settings]):
            token_ids = self._largest(logits, rows)
            state = self._limits(logits, rows, token_ids, top_k, settings, num_passes)
            known = [logits, rows, token_ids, top_k, settings, state]
            sums = [self._floats(self.parts), self._floats(self.parts)]
            kernels = self.params.sampling
            found = self._call(
                draw_parts(self.vocab_size, kernels, self.params.features), known, sums
            )
            drawn = self._call(draw(self.vocab_size, kernels), [*known, *found], [self._integers()])
            self.builder.emit_func_output(drawn[0])

    def _limits(
        self,
        logits: Expr,
        rows: Expr,
        token_ids: Expr,
        top_k: Expr,
        settings: Expr,
        num_passes: int,
    ) -> Expr:
        """The state of the search when it is done, its integers."""
        state = [self._integers(INTEGERS), self._floats(FLOATS)]
        bins = [self._integers(self.parts, BINS), self._floats(self.parts, BINS)]
        begin, histogram, narrow = (
            make(self.vocab_size, self.params.sampling)
            for make in (limits_begin, limits_histogram, limits_narrow)
        )
        integers, floats = self._call(begin, [token_ids, top_k, settings], state)
        for _ in range(num_passes):
            seen = [logits, rows, token_ids, settings, integers]
            counts, weights = self._call(histogram, seen, bins)
            known = [counts, weights, top_k, settings, integers, floats]
            integers, floats = self._call(narrow, known, state)
        return integers

    def _largest(self, logits: Expr, rows: Expr) -> Expr:
        sums = [self._integers(self.parts), self._integers(self.parts)]
        params = self.params.sampling
        found = self._call(argmax_parts(self.vocab_size, params), [logits, rows], sums)
        return self._call(argmax_merge(self.vocab_size, params), found, [self._integers()])[0]

    def _inputs(self) -> tuple[relax.Var, relax.Var]:
        count = tvm.tirx.Var("L", "int64")
        logits = relax.Var("logits", relax.TensorType([count, self.vocab_size], "float32"))
        return logits, relax.Var("rows", self._integers())

    def _integers(self, *columns: int) -> relax.TensorType:
        return relax.TensorType([self.rows, *columns], "int32")

    def _floats(self, *columns: int) -> relax.TensorType:
        return relax.TensorType([self.rows, *columns], "float32")

    def _call(self, func: Expr, arguments: list[Expr], out: list[relax.TensorType]) -> list[Expr]:
        """Calls a kernel, which equal calls share; its fresh outputs."""
        name = str(func.attrs["global_symbol"])
        variable = self.builder.add_func(func, name)
        call = relax.op.call_tir(variable, arguments, out_ty=out if len(out) > 1 else out[0])
        value = self.builder.emit(call)
        return [value[i] for i in range(len(out))] if len(out) > 1 else [value]
