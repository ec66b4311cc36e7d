"""Integer dot products: sixteen rows of unsigned weight codes times signed activation codes.

The functions here run while an IRBuilder frame is open, as those of panels.py do. A *unit* is the
run of input features that share both a weight scale and an activation scale: its sum is exact in
int32, and leaves the integers once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import i64
from llmc.targets.cpu.kernels.bfloat16 import from_float32
from llmc.targets.cpu.kernels.byte_dot import CENTRE, ByteSum
from llmc.targets.cpu.kernels.panels import (
    F32X16,
    WeightPanels,
    get,
    lanes,
    prefetch,
    put,
    registers,
    splat,
)
from llmc.targets.cpu.kernels.register_tiles import Add, Chunks, Turn
from llmc.targets.cpu.kernels.unpacked import UnpackedPanels, num_chunks
from llmc.targets.cpu.layout import PANEL, stored_zero_point
from llmc.targets.cpu.parameters import IntegerParameters

Expr = Any


def activation_block(fmt: WeightFormat, k: int, limit: int) -> int | None:
    """Activation features that share a scale: the most that divide k and fit the format's groups.

    None where the integer kernels cannot take the matrix: float formats, and rows that no block of
    whole words divides.
    """
    if fmt.is_float or k % 8:
        return None
    step = fmt.group or 32
    blocks = [b for b in range(step, max(limit, step) + 1, step) if k % b == 0]
    return blocks[-1] if blocks else None


def sum_factor(fmt: WeightFormat) -> int:
    """What a unit's sum of activation codes is multiplied by: the products' zero point, negated.

    Formats with a minimum multiply the plain sum by it later.
    """
    return 1 if fmt.has_min else -stored_zero_point(fmt)


def unit_of(fmt: WeightFormat, block: int) -> int:
    """Input features that share a weight scale and an activation scale."""
    return min(fmt.group or block, block)


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Quantized activations in a kernel.

    codes `[1, R, K]` int8; scales `[1, R, K / block]` float32; sums `[1, R, K / unit]` int32: what
    the codes of a unit add up to, times `sum_factor` of the weights' format.
    """

    codes: Expr
    scales: Expr
    sums: Expr
    block: int

    def word(self, row: Expr, word: Expr) -> Expr:
        """Four consecutive codes of a row in all lanes, as int8x64."""
        four = self.codes[i64(0), row, T.ramp(word * i64(4), i64(1), 4)]
        return T.reinterpret("int8x64", T.broadcast(T.reinterpret("int32", four), PANEL))

    def scale(self, row: Expr, block: Expr) -> Expr:
        """A block's scale in all lanes."""
        return T.broadcast(self.scales[i64(0), row, block], PANEL)

    def values(self, row: Expr, first: Expr) -> Expr:
        """Sixteen features' codes from `first` on, float32x16."""
        return T.Cast(F32X16, self.codes[i64(0), row, lanes(first)])

    def bfloat16(self, row: Expr, first: Expr) -> Expr:
        """Sixteen features' values from `first`, a multiple of 16, rounded to bfloat16."""
        scale = self.scale(row, T.floordiv(first, i64(self.block)))
        return from_float32(self.values(row, first) * scale)

    def sum(self, row: Expr, unit: Expr) -> Expr:
        """A unit's entry of sums, int32."""
        return self.sums[i64(0), row, unit]


def integer_panels(
    weights: WeightPanels,
    expert: Expr,
    panels: Sequence[Expr],
    x: CodedRows,
    rows: Sequence[Expr],
    params: IntegerParameters,
    turn: Turn | None = None,
    following: Expr | None = None,
    unpacked: UnpackedPanels | None = None,
    before: list[list[Expr]] | None = None,
) -> list[list[Expr]]:
    """The products of a few activation rows with a few panels: a float32x16 for each [row][panel].

    y = Σ_blocks a · Σ_groups (s · Σ (code - zero)·x + min · Σ x), the sums over codes in int32.
    A tile of several rows asks for its `turn`'s share of the panels that follow. `following` is the
    panel that is read after the last one, where that is not the next. Of a chunk of the panels,
    `unpacked`, the products are added to what there is `before`.
    """
    tile = _Tile(weights, expert, panels, x, rows, params, turn, following, unpacked, before)
    tile.multiply()
    return tile.result()


def unpacked_chunks(
    weights: WeightPanels,
    expert: Expr,
    x: CodedRows,
    params: IntegerParameters,
    row_of: Callable[[Expr], Expr] = lambda row: row,
) -> Chunks:
    """How many rows are multiplied by a format that is put together; `row_of` is where in x a row
    lies.
    """
    count = num_chunks(weights.fmt, weights.k, x.block, params.chunk)
    params = replace(params, tiling=params.chunked)

    def add(
        unpacked: UnpackedPanels, rows: list[Expr], turn: Turn | None, before: list[list[Expr]]
    ) -> list[list[Expr]]:
        places = [T.Bind(row_of(row)) for row in rows]
        return integer_panels(
            *(weights, expert, unpacked.panels, x, places, params, turn),
            unpacked=unpacked,
            before=before,
        )

    def of(panels: list[Expr]) -> Callable[[Expr], Add]:
        memory = UnpackedPanels.allocate(weights, panels, count)
        return lambda chunk: partial(add, memory.filled(expert, chunk))

    return Chunks(params.tiling, params.chunk_rows, count, of)


class _Tile:
    """Accumulators of rows × panels: int32 within a unit, float32 across units."""

    def __init__(
        self,
        weights: WeightPanels,
        expert: Expr,
        panels: Sequence[Expr],
        x: CodedRows,
        rows: Sequence[Expr],
        params: IntegerParameters,
        turn: Turn | None,
        following: Expr | None,
        unpacked: UnpackedPanels | None,
        before: list[list[Expr]] | None,
    ) -> None:
        self.turn, self.following = turn, following
        self.lead: Expr | None = None  # words from those multiplied to those asked for meanwhile
        self.weights, self.expert, self.panels = weights, expert, panels
        self.x, self.rows = x, rows
        self.source = weights if unpacked is None else unpacked
        self.blocks = weights.k // x.block // (1 if unpacked is None else unpacked.count)
        self.first_block = i64(0) if unpacked is None else unpacked.chunk * i64(self.blocks)
        self.params = params
        self.unit = unit_of(weights.fmt, x.block)
        # Whether codes are multiplied as signed bytes, CENTRE taken off: narrower ones are as well
        # signed as they are.
        whole = weights.fmt.code_bits == 8 or weights.fmt.codebook is not None
        self.centred = params.dot.signed and whole
        self.code_bits = 8 if whole else weights.fmt.code_bits
        self.size = len(rows) * len(panels)
        # Chains of dependent dot products hide their latency; short units do so among themselves.
        dots = self.unit // 4
        self.chains = max(1, min(2, params.min_chains // self.size)) if dots > 4 else 1
        self.totals = registers(self.size)
        if params.tiling.sums_in_memory and len(rows) > 1:
            params.dot.keep_in_memory(self.totals)
        for i in range(self.size):
            r, p = divmod(i, len(panels))
            put(self.totals, i, splat(0.0) if before is None else before[r][p])

    def multiply(self) -> None:
        """Adds all blocks, or the chunk's, to the totals."""
        # What lies in planes changes its place from block to block: known places are cheaper.
        is_fine = bool(self.weights.fmt.sub_scales) and len(self.rows) == 1
        together = 2 if is_fine and self.blocks % 2 == 0 else 1
        with T.serial(i64(self.blocks // together)) as step:
            for j in range(together):
                self._block(T.Bind(step * i64(together) + i64(j)))

    def _block(self, number: Expr) -> None:
        """Adds a block to the totals."""
        weights, group, block = self.weights, self.weights.fmt.group, self.x.block
        b = T.Bind(self.first_block + number)
        if self.turn is not None:
            share = self.turn.share(number, self.blocks)
            self.lead = T.Bind((share - b) * i64(block // weights.width))
            first = share * i64(block // group if group else 1)
            self._fetch_next(lambda panel: weights.scale_lines(self.expert, panel, first))
        if group and group < block:
            self._groups(b, block // group)
            return
        sums = self._unit(b)
        scales = [T.Bind(self.x.scale(row, b)) for row in self.rows]
        if not group:  # the row's scale comes last
            for i, value in enumerate(sums):
                scaled = value * scales[i // len(self.panels)]
                put(self.totals, i, get(self.totals, i) + scaled)
            return
        for i, value in enumerate(self._scaled(sums, b, [None] * self.size)):
            put(self.totals, i, get(self.totals, i) + value * scales[i // len(self.panels)])

    def _groups(self, block: Expr, count: int) -> None:
        """A block of several groups: scaled by the weights' scales first, by its own at the end."""
        partial = registers(self.size)
        for i in range(self.size):
            put(partial, i, splat(0.0))

        def add(group: Expr) -> None:
            unit = T.Bind(block * i64(count) + group)
            before = [get(partial, i) for i in range(self.size)]
            for i, value in enumerate(self._scaled(self._unit(unit), unit, before)):
                put(partial, i, value)

        if self.x.block // self.weights.width <= self._step_words:
            for g in range(count):
                add(i64(g))
        else:
            with T.serial(i64(count)) as number:
                add(number)
        for r, row in enumerate(self.rows):
            scale = T.Bind(self.x.scale(row, block))
            for p in range(len(self.panels)):
                i = r * len(self.panels) + p
                put(self.totals, i, get(self.totals, i) + get(partial, i) * scale)

    def _scaled(self, sums: list[Expr], group: Expr, before: Sequence[Expr | None]) -> list[Expr]:
        """before + scale · sum + min · Σx for every [row][panel]."""
        source = self.source
        scales = [T.Bind(source.scale(self.expert, p, group)) for p in self.panels]
        values = []
        for i, (total, start) in enumerate(zip(sums, before, strict=True)):
            value = total * scales[i % len(self.panels)]
            values.append(value if start is None else start + value)
        if not self.weights.fmt.has_min:
            return [T.Bind(v) for v in values]
        mins = [T.Bind(source.minimum(self.expert, p, group)) for p in self.panels]
        for r, row in enumerate(self.rows):
            total = T.Bind(T.broadcast(T.Cast("float32", self.x.sum(row, group)), PANEL))
            for p in range(len(self.panels)):
                i = r * len(self.panels) + p
                values[i] = values[i] + mins[p] * total
        return [T.Bind(v) for v in values]

    def _unit(self, unit: Expr) -> list[Expr]:
        """Σ (code - zero)·x of one unit as float32x16, for every [row][panel]."""
        width, params = self.weights.width, self.params
        words = self.unit // width
        zero = stored_zero_point(self.weights.fmt)
        sums: list[list[Expr]] = []
        for row in self.rows:
            start = self._start(row, unit)
            for _ in self.panels:
                nothing = T.broadcast(T.int32(0), PANEL)
                sums.append([T.broadcast(start, PANEL)] + [nothing] * (self.chains - 1))
        first = T.Bind(unit * i64(words))
        step_words = self._step_words
        steps, tail = divmod(words, step_words)
        if steps == 1 or (steps == 2 and not tail):
            sums = self._words(sums, first, words)
            tail = 0
        elif steps:
            carried = registers(self.size * self.chains, "int32")
            flat = [s for chain in sums for s in chain]
            for i, value in enumerate(flat):
                put(carried, i, value)
            with T.serial(i64(steps)) as step:
                self._load(carried, sums)
                at = T.Bind(first + step * i64(step_words))
                done = self._words(sums, at, step_words)
                for i, value in enumerate(s for chain in done for s in chain):
                    put(carried, i, value)
            self._load(carried, sums)
        if tail:
            sums = self._words(sums, first + i64(words - tail), tail)
        totals = [chain[0] if len(chain) == 1 else chain[0] + chain[1] for chain in sums]
        return [T.Bind(T.Cast(F32X16, total)) for total in totals]

    @property
    def _step_words(self) -> int:
        """Stored words that are multiplied without a loop."""
        return self.params.unit_words if len(self.rows) == 1 else self.params.tiling.words

    def _start(self, row: Expr, unit: Expr) -> Expr:
        """What is added to the products of a unit's codes as they are multiplied."""
        zero = stored_zero_point(self.weights.fmt)
        taken_off = CENTRE if self.centred else 0
        if zero == taken_off:
            return T.int32(0)
        total = self.x.sum(row, unit)  # Σ x · sum_factor
        return total if taken_off == 0 else total * T.int32(taken_off)

    def _load(self, carried: Expr, sums: list[list[Expr]]) -> None:
        for i, chain in enumerate(sums):
            for c in range(self.chains):
                chain[c] = get(carried, i * self.chains + c)

    def _words(self, sums: list[list[Expr]], first: Expr, count: int) -> list[list[Expr]]:
        """Adds `count` stored words from word `first` of every panel."""
        weights, width, params = self.weights, self.weights.width, self.params
        found = [[ByteSum(params.dot, self.code_bits, s) for s in chain] for chain in sums]
        step = 0
        for j in range(count):
            word = T.Bind(first + i64(j))
            begins_line = j % weights.words_per_line == 0  # the first word does
            if params.tiling.ahead_words and len(self.rows) == 1 and begins_line:
                for panel in self.panels:
                    ahead = word + i64(params.tiling.ahead_words)
                    address = weights.ahead_address(self.expert, panel, ahead, self.following)
                    prefetch(address, params.ahead_cache)
            if self.lead is not None and begins_line:
                ahead = T.Bind(word + self.lead)
                self._fetch_next(lambda p, at=ahead: weights.word_lines(self.expert, p, at))
            stored = [T.Bind(self.source.word(self.expert, p, word)) for p in self.panels]
            for part in range(width // 4):
                codes = [T.Bind(self._bytes(s, part)) for s in stored]
                chain = step % self.chains
                for r, row in enumerate(self.rows):
                    x = T.Bind(self.x.word(row, word * i64(width // 4) + i64(part)))
                    for p, code in enumerate(codes):
                        found[r * len(self.panels) + p][chain].add(code, x)
                step += 1
        return [[s.value() for s in chain] for chain in found]

    def _fetch_next(self, addresses: Callable[[Expr], Iterable[Expr]]) -> None:
        """Asks for addresses(panel) of the next panels: several rows leave memory the time."""
        assert self.turn is not None
        for panel in self.panels:
            for address in addresses(T.Bind(panel + self.turn.then.panels)):
                prefetch(address, self.params.next_cache)

    def _bytes(self, word: Expr, part: int) -> Expr:
        """Four consecutive features' codes of each of 16 rows, as uint8x64."""
        if self.weights.fmt.bits == 4:
            if part:
                word = T.shift_right(word, T.broadcast(T.int32(4), PANEL))
            word = T.bitwise_and(word, T.broadcast(T.int32(0x0F0F0F0F), PANEL))
        if self.centred:
            word = T.bitwise_xor(word, T.broadcast(T.int32(-0x7F7F7F80), PANEL))
        return T.reinterpret("uint8x64", word)

    def result(self) -> list[list[Expr]]:
        """The totals by row and panel; a row's own scale is multiplied here."""
        count = len(self.panels)
        values = [get(self.totals, i) for i in range(self.size)]
        if not self.weights.fmt.group:
            scales = [T.Bind(self.weights.scale(self.expert, p, i64(0))) for p in self.panels]
            values = [v * scales[i % count] for i, v in enumerate(values)]
        return [values[r * count : (r + 1) * count] for r in range(len(self.rows))]
