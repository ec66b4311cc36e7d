"""What both forms of paged attention share: its description, its buffers, scores and pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.targets.building import f32, i64, to_f32
from llmc.targets.gpu.kernels.block import quotient
from llmc.targets.gpu.kernels.kv_pages import KvType, PageShape, key_shape, value_shape

Expr = Any
LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One attention; `heads` query heads share a K/V head."""

    num_kv_heads: int
    heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    kv: KvType
    scale: float
    window: int | None
    softcap: float | None
    group: int

    @property
    def keys(self) -> PageShape:
        """Keys of a head in a page."""
        return key_shape(self.kv, self.head_dim, self.page_size)

    @property
    def values(self) -> PageShape:
        """Values of a head in a page."""
        return value_shape(self.kv, self.v_head_dim, self.page_size)

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by: scores are in units of log2 unless they are capped."""
        return self.scale * (1.0 if self.softcap is not None else LOG2E)

    def capped(self, score: Expr) -> Expr:
        """A score of scaled queries in units of log2."""
        if self.softcap is None:
            return score
        # tanh(u) = 1 - 2 / (exp2(2 u log2 e) + 1) is right at both ends: exp2 is 0 or infinite.
        power = T.exp2(score * f32(2 * LOG2E / self.softcap))
        return f32(self.softcap * LOG2E) - f32(2 * self.softcap * LOG2E) / (power + f32(1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The kernel's buffers, see kernels/attention.py, and its symbolic extents."""

    rows: Expr
    sequences: Expr
    q: Expr
    q_starts: Expr
    kv_lens: Expr
    tables: Expr
    k_pages: Expr
    v_pages: Expr
    sinks: Expr | None
    out: Expr

    def start(self, sequence: Expr) -> Expr:
        """First packed row of a sequence (of S: the end), int64."""
        return T.Cast("int64", self.q_starts[sequence])

    def length(self, sequence: Expr) -> Expr:
        """Tokens of a sequence, this step's included, int64."""
        return T.Cast("int64", self.kv_lens[sequence])

    def page(self, shape: Shape, sequence: Expr, position: Expr) -> Expr:
        """The page that holds a position, int64."""
        number = quotient(position, shape.page_size)
        return T.Cast("int64", self.tables[i64(shape.group), sequence, number])

    def sink(self, head: Expr) -> Expr:
        """A head's sink in units of log2."""
        assert self.sinks is not None
        return to_f32(self.sinks[head]) * f32(LOG2E)
