"""Which rows each expert of a mixture-of-experts layer multiplies.

The functions here run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import i64
from llmc.targets.cpu.kernels.panels import scratch

Expr = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The choices sorted by expert; all int32.

    order `[T · top_k]`: choices, an expert's together; expert e's end where starts `[X + 1]` of e +
    1 says; active `[X]`: the experts that were chosen at all, `num_active` of them.
    """

    order: Expr
    starts: Expr
    active: Expr
    num_active: Expr

    def of(self, index: Expr) -> tuple[Expr, Expr, Expr]:
        """Active expert number `index`, its first position and its number of positions."""
        expert = T.Bind(T.Cast("int64", self.active[index]))
        first = T.Bind(T.Cast("int64", self.starts[expert]))
        count = T.Bind(T.Cast("int64", self.starts[expert + i64(1)]) - first)
        return expert, first, count


def group_choices(expert_ids: Expr, tokens: Expr, top_k: int, num_experts: int) -> Groups:
    """A counting sort of the choices by expert."""
    order = scratch((tokens * i64(top_k),), "int32")
    starts = scratch((num_experts + 1,), "int32")
    ends = scratch((num_experts,), "int32")
    active = scratch((num_experts,), "int32")
    count = scratch((1,), "int32")
    one = T.int32(1)
    with T.serial(i64(num_experts)) as expert:
        T.buffer_store(ends, T.int32(0), [expert])
    with T.serial(tokens) as token, T.serial(i64(top_k)) as j:
        chosen = T.Bind(expert_ids[token, j])
        T.buffer_store(ends, ends[chosen] + one, [chosen])
    T.buffer_store(starts, T.int32(0), [i64(0)])
    T.buffer_store(count, T.int32(0), [i64(0)])
    with T.serial(i64(num_experts)) as expert:
        number = T.Bind(ends[expert])
        with T.If(number > T.int32(0)), T.Then():
            T.buffer_store(active, T.Cast("int32", expert), [count[i64(0)]])
            T.buffer_store(count, count[i64(0)] + one, [i64(0)])
        # From here on `ends` is where the expert's next choice goes.
        T.buffer_store(ends, starts[expert], [expert])
        T.buffer_store(starts, starts[expert] + number, [expert + i64(1)])
    with T.serial(tokens) as token, T.serial(i64(top_k)) as j:
        chosen = T.Bind(expert_ids[token, j])
        place = T.Bind(ends[chosen])
        T.buffer_store(order, T.Cast("int32", token * i64(top_k) + j), [place])
        T.buffer_store(ends, place + one, [chosen])
    return Groups(
        order=order,
        starts=starts,
        active=active,
        num_active=T.Bind(T.Cast("int64", count[i64(0)])),
    )
