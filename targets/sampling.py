"""Choosing tokens where the logits are: the functions that an artifact has beside its entry points.

    choose_largest(logits [L, V] f32, rows [R] i32) -> token_ids [R] i32
    choose_drawn(logits [L, V] f32, rows [R] i32, top_k [R] i32, settings [R, 5] f32)
        -> token_ids [R] i32
    choose_limited, of the same signature

`rows` are the rows of the logits to choose from. A token id of -1 stands for a row whose largest
logit is no finite number. docs/artifact.md has the meaning of top_k and settings. choose_drawn
is for rows without top_k (but for 1, the largest) and top_p, and need not heed them: the search
that they take is most of the work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from llmc.targets.base import Sampling
from llmc.targets.token_search import SETTINGS

Expr = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawInputs:
    """What a draw starts from: the arguments of its function, and each row's likeliest token."""

    logits: Expr
    rows: Expr
    token_ids: Expr
    top_k: Expr
    settings: Expr

    @property
    def arguments(self) -> list[Expr]:
        """All of them, as kernels take them."""
        return [self.logits, self.rows, self.token_ids, self.top_k, self.settings]


class SamplingFunctions(ABC):
    """Builds the module, one Relax function after the other, of a target's kernels."""

    rule: str

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.builder = relax.BlockBuilder()
        self.rows = tvm.tirx.Var("R", "int64")

    def build(self) -> Sampling:
        """All functions with their kernels."""
        logits, rows = self._inputs()
        with self.builder.function("choose_largest", [logits, rows]):
            self.builder.emit_func_output(self.largest(logits, rows))
        for name, limited in (("choose_drawn", False), ("choose_limited", True)):
            logits, rows = self._inputs()
            top_k = relax.Var("top_k", self.integers())
            settings = relax.Var("settings", self.floats(SETTINGS))
            with self.builder.function(name, [logits, rows, top_k, settings]):
                inputs = DrawInputs(
                    logits=logits,
                    rows=rows,
                    token_ids=self.largest(logits, rows),
                    top_k=top_k,
                    settings=settings,
                )
                self.builder.emit_func_output(self.drawn(inputs, limited=limited))
        return Sampling(rule=self.rule, module=self.builder.get())

    @abstractmethod
    def largest(self, logits: Expr, rows: Expr) -> Expr:
        """token_ids `[R]` i32: each row's likeliest token."""

    @abstractmethod
    def drawn(self, inputs: DrawInputs, *, limited: bool) -> Expr:
        """`[R]` i32: the likeliest tokens, or others in their place."""

    def integers(self, *columns: int) -> relax.TensorType:
        """`[R, *columns]` int32."""
        return relax.TensorType([self.rows, *columns], "int32")

    def floats(self, *columns: int) -> relax.TensorType:
        """`[R, *columns]` float32."""
        return relax.TensorType([self.rows, *columns], "float32")

    def call(self, func: Expr, arguments: list[Expr], out: list[relax.TensorType]) -> list[Expr]:
        """Calls a kernel, which equal calls share; its fresh outputs."""
        name = str(func.attrs["global_symbol"])
        variable = self.builder.add_func(func, name)
        call = relax.op.call_tir(variable, arguments, out_ty=out if len(out) > 1 else out[0])
        value = self.builder.emit(call)
        return [value[i] for i in range(len(out))] if len(out) > 1 else [value]

    def _inputs(self) -> tuple[relax.Var, relax.Var]:
        count = tvm.tirx.Var("L", "int64")
        logits = relax.Var("logits", relax.TensorType([count, self.vocab_size], "float32"))
        return logits, relax.Var("rows", self.integers())
