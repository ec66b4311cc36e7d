"""A chunk of a few panels with its codes as bytes and its scales multiplied out, in scratch.

Kernels that multiply many rows by the same panels put together once what lies in planes and
sub-scales (see targets/cpu/layout.py), and read it as if it had been stored so: some features at a
time, which stay in the first-level cache. The functions here run while an IRBuilder frame is open,
as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import i64
from llmc.targets.cpu.kernels.panels import WeightPanels, lanes, scratch
from llmc.targets.cpu.layout import PANEL

Expr = Any

_STEP = 8  # words: as many as the finest plane has in one


@dataclass(frozen=True, slots=True)
class UnpackedPanels:
    """Reads like WeightPanels what lies in `chunk`, of `count` of a row, of consecutive panels."""

    weights: WeightPanels
    panels: Sequence[Expr]
    chunk: Expr
    count: int
    codes: Expr | None  # `[panels, words, 16]` int32
    scales: Expr | None  # `[panels, groups, 16]` float32
    mins: Expr | None

    @classmethod
    def allocate(cls, weights: WeightPanels, panels: Sequence[Expr], count: int) -> UnpackedPanels:
        """Scratch for a chunk, of `count` of a row, as far as the format needs it."""
        fmt = weights.fmt
        codes = scales = mins = None
        if fmt.planes != (fmt.bits,):
            codes = scratch((len(panels), weights.words // count, PANEL), "int32")
        if fmt.sub_scales is not None:
            scales = scratch((len(panels), weights.groups // count, PANEL))
            mins = scratch((len(panels), weights.groups // count, PANEL)) if fmt.has_min else None
        return cls(weights, panels, i64(0), count, codes, scales, mins)

    def filled(self, expert: Expr, chunk: Expr) -> UnpackedPanels:
        """The same, with another chunk put together there."""
        weights, lane = self.weights, lanes(i64(0))
        if self.codes is not None:
            num_words = weights.words // self.count
            assert num_words % _STEP == 0, (weights.fmt.name, weights.k)
            with T.serial(i64(num_words // _STEP)) as step:
                first = step * i64(_STEP)  # not bound: places in a line are then known
                for p, panel in enumerate(self.panels):
                    at = chunk * i64(num_words) + first
                    words = [weights.word(expert, panel, at + i64(j)) for j in range(_STEP)]
                    for j, word in enumerate([T.Bind(w) for w in words]):
                        T.buffer_store(self.codes, word, [i64(p), first + i64(j), lane])
        if self.scales is not None:
            num_groups = weights.groups // self.count
            with T.serial(i64(num_groups)) as number:
                group = chunk * i64(num_groups) + number
                for p, panel in enumerate(self.panels):
                    scale = weights.scale(expert, panel, group)
                    T.buffer_store(self.scales, scale, [i64(p), number, lane])
                    if self.mins is not None:
                        minimum = weights.minimum(expert, panel, group)
                        T.buffer_store(self.mins, minimum, [i64(p), number, lane])
        return replace(self, chunk=chunk)

    def word(self, expert: Expr, panel: Expr, word: Expr) -> Expr:
        """Sixteen rows' words."""
        if self.codes is None:
            return self.weights.word(expert, panel, word)
        first = self.chunk * i64(self.weights.words // self.count)
        return self.codes[panel - self.panels[0], word - first, lanes(i64(0))]

    def scale(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """Sixteen rows' scales, float32x16."""
        if self.scales is None:
            return self.weights.scale(expert, panel, group)
        return self.scales[panel - self.panels[0], group - self._group, lanes(i64(0))]

    def minimum(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """Sixteen rows' minimums, float32x16."""
        if self.mins is None:
            return self.weights.minimum(expert, panel, group)
        return self.mins[panel - self.panels[0], group - self._group, lanes(i64(0))]

    @property
    def _group(self) -> Expr:
        return self.chunk * i64(self.weights.groups // self.count)


def num_chunks(fmt: WeightFormat, k: int, block: int, limit: int) -> int:
    """Chunks of a row of k features: of at most `limit` each, if its super-blocks and the blocks of
    activations are not larger.
    """
    whole = fmt.group if fmt.sub_scales is None else fmt.sub_scales.group
    step = lcm(whole, block, 4 * _STEP)
    return k // max(c for c in range(step, max(limit, step) + 1, step) if k % c == 0)
