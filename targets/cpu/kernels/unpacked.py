"""A few panels of a matrix with their codes as bytes and their scales multiplied out, in scratch.

Kernels that multiply many rows by the same panels put together once what lies in planes and
sub-scales (see targets/cpu/layout.py), and read it as if it had been stored so. The functions here
run while an IRBuilder frame is open, as those of panels.py do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """Reads like WeightPanels, for the panels from `first` on: those that were unpacked."""

    weights: WeightPanels
    first: Expr
    codes: Expr | None  # `[panels, words, 16]` int32
    scales: Expr | None  # `[panels, groups, 16]` float32
    mins: Expr | None

    def word(self, expert: Expr, panel: Expr, word: Expr) -> Expr:
        """Sixteen rows' words."""
        if self.codes is None:
            return self.weights.word(expert, panel, word)
        return self.codes[panel - self.first, word, lanes(i64(0))]

    def scale(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """Sixteen rows' scales, float32x16."""
        if self.scales is None:
            return self.weights.scale(expert, panel, group)
        return self.scales[panel - self.first, group, lanes(i64(0))]

    def minimum(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """Sixteen rows' minimums, float32x16."""
        if self.mins is None:
            return self.weights.minimum(expert, panel, group)
        return self.mins[panel - self.first, group, lanes(i64(0))]


def unpack(weights: WeightPanels, expert: Expr, panels: Sequence[Expr]) -> UnpackedPanels:
    """Puts together consecutive panels, as far as the format needs it."""
    fmt, count = weights.fmt, len(panels)
    codes = scales = mins = None
    if fmt.planes != (fmt.bits,):
        assert weights.words % _STEP == 0, (fmt.name, weights.k)
        codes = scratch((count, weights.words, PANEL), "int32")
        with T.serial(i64(weights.words // _STEP)) as step:
            first = step * i64(_STEP)  # not bound: places in a line are then known
            for p, panel in enumerate(panels):
                words = [weights.word(expert, panel, first + i64(j)) for j in range(_STEP)]
                for j, word in enumerate([T.Bind(w) for w in words]):
                    T.buffer_store(codes, word, [i64(p), first + i64(j), lanes(i64(0))])
    if fmt.sub_scales is not None:
        scales = scratch((count, weights.groups, PANEL))
        mins = scratch((count, weights.groups, PANEL)) if fmt.has_min else None
        with T.serial(i64(weights.groups)) as group:
            for p, panel in enumerate(panels):
                at = [i64(p), group, lanes(i64(0))]
                T.buffer_store(scales, weights.scale(expert, panel, group), at)
                if mins is not None:
                    T.buffer_store(mins, weights.minimum(expert, panel, group), at)
    return UnpackedPanels(weights, panels[0], codes, scales, mins)
