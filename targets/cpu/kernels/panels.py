"""Emitting the reads of a panel-packed weight matrix (see targets/cpu/layout.py) into a kernel
under construction.

The functions here run while an IRBuilder frame is open: Python loops become straight code,
`T.serial` a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from llmc.formats import WeightFormat
from llmc.targets.building import argument, i64, on_stack
from llmc.targets.cpu.kernels.byte_table import ByteTable, lookup_scalar
from llmc.targets.cpu.kernels.vector import SERIAL_FLOATS
from llmc.targets.cpu.layout import (
    PANEL,
    ceildiv,
    code_offsets,
    codes_per_word,
    num_panels,
    packed_parts,
    plane_suffixes,
    stored_zero_point,
    sub_scale_planes,
)

Expr = Any
F32X16 = "float32x16"
WHOLE = 1.5 * 2**23
"""A float32's last bit counts ones there, above and below: numbers added to it are rounded."""
WHOLE_BITS = 0x4B400000


def splat(value: float) -> Expr:
    """`value` in all 16 lanes."""
    return T.broadcast(T.float32(value), PANEL)


def lanes(start: Expr) -> Expr:
    """The 16 consecutive indices from `start`."""
    return T.ramp(start, i64(1), PANEL)


def scratch(shape: tuple[int | Expr, ...], dtype: str = "float32") -> Expr:
    """A workspace in memory, private to the scope it is opened in."""
    dims = [i64(d) if isinstance(d, int) else d for d in shape]
    return T.alloc_buffer(dims, dtype)


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix in a buffer `[R, N]` or, where `batched`, `[1, R, N]`."""

    buffer: Expr
    batched: bool = True

    def at(self, row: Expr, column: Expr) -> Expr:
        """The value there; a vector where the column is a ramp."""
        return self.buffer[self._index(row, column)]

    def set(self, row: Expr, column: Expr, value: Expr) -> None:
        """Stores a value, or a vector where the column is a ramp."""
        T.buffer_store(self.buffer, value, list(self._index(row, column)))

    def _index(self, row: Expr, column: Expr) -> tuple[Expr, ...]:
        return (i64(0), row, column) if self.batched else (row, column)


def registers(count: int, dtype: str = "float32") -> Expr:
    """`count` vectors of 16 numbers that a loop carries, `[count, 16]`.

    LLVM keeps them in registers inside a loop where every index is constant. Behind them is the
    stack where a build switches `tirx.disable_storage_rewrite` on (the rewriting loses the
    annotation), and otherwise TVM's workspace pool, which costs a short task some 5 %.
    """
    return on_stack((count, PANEL), dtype)


def get(vectors: Expr, index: int) -> Expr:
    """Vector `index` of `registers`."""
    return vectors[i64(index), lanes(i64(0))]


def put(vectors: Expr, index: int, value: Expr) -> None:
    """Sets vector `index` of `registers`."""
    T.buffer_store(vectors, value, [i64(index), lanes(i64(0))])


def for_each_row(count: Expr, features: int, body: Callable[[Expr], None]) -> None:
    """`body(row)` for every row, in parallel where that pays."""
    with T.If(count * i64(features) <= i64(SERIAL_FLOATS)):
        with T.Then(), T.serial(count) as row:
            body(row)
        with T.Else(), T.parallel(count) as row:
            body(row)


def prefetch(address: Expr, cache: int = 1) -> None:
    """Asks for the cache line at `address`, which may lie past the buffer's end.

    It comes into the caches from level `cache` on.
    """
    T.evaluate(
        T.call_llvm_intrin(
            "void",
            "llvm.prefetch.p0",
            address,
            T.int32(0),  # for reading
            T.int32(4 - cache),  # 3 is nearest
            T.int32(1),  # data
        )
    )


@dataclass(frozen=True, slots=True)
class Code:
    """One code of each of a panel's rows, taken from a word vector: value · 2^-exponent is the
    code.
    """

    offset: int
    value: Expr
    exponent: int


def decode(fmt: WeightFormat, word: Expr, count: int = PANEL) -> list[Code]:
    """The codes in a vector of `count` stored words (one word: a scalar), as float32.

    A code stays where it is in its word (the activation or the scale absorbs the power of two),
    which saves the shift: AND, convert. Only the topmost has to move, because the conversion is
    signed.
    """

    def typed(dtype: str) -> str:
        return dtype if count == 1 else f"{dtype}x{count}"

    def each(value: Expr) -> Expr:
        return value if count == 1 else T.broadcast(value, count)

    if codes_per_word(fmt) == 1:
        return [Code(0, word if fmt.bits == 32 else T.Cast(typed("float32"), word), 0)]
    if fmt.is_float:  # bfloat16 is the upper half of a float32
        low = T.shift_left(word, each(T.int32(16)))
        high = T.bitwise_and(word, each(T.int32(-65536)))
        return [Code(i, T.reinterpret(typed("float32"), h), 0) for i, h in enumerate((low, high))]
    codes = []
    for position, offset in enumerate(code_offsets(fmt)):
        exponent = position * fmt.bits
        if exponent + fmt.bits == 32:
            bits = T.shift_right(T.reinterpret(typed("uint32"), word), each(T.uint32(exponent)))
            bits, exponent = T.reinterpret(typed("int32"), bits), 0
        else:
            bits = T.bitwise_and(word, each(T.int32(((1 << fmt.bits) - 1) << exponent)))
        codes.append(Code(offset, T.Cast(typed("float32"), bits), exponent))
    return codes


@dataclass(frozen=True, slots=True)
class WeightPanels:
    """The buffers of one packed matrix (or of a stack of experts) inside a kernel."""

    fmt: WeightFormat
    m: int
    k: int
    stacked: bool
    buffers: Mapping[str, Expr]  # by the arrays' suffixes
    table: ByteTable | None  # how codes are looked up where the format has a code book

    @classmethod
    def arguments(
        cls,
        fmt: WeightFormat,
        m: int,
        k: int,
        num_experts: int | None = None,
        *,
        table: ByteTable | None = None,
    ) -> WeightPanels:
        """Declares the packed arrays as the kernel's next arguments."""
        arrays = packed_parts(fmt, m, k, num_experts=num_experts)
        buffers = {a.suffix: argument(f"weight_{a.suffix}", a.shape, a.dtype) for a in arrays}
        return cls(fmt, m, k, num_experts is not None, buffers, table)

    @property
    def panels(self) -> int:
        """Panels of the matrix."""
        return num_panels(self.m)

    @property
    def width(self) -> int:
        """Input features in a word."""
        return codes_per_word(self.fmt)

    @property
    def words(self) -> int:
        """Words in a row."""
        return ceildiv(self.k, self.width)

    @property
    def groups(self) -> int:
        """Scales in a row (1 for float formats, which have none)."""
        return 1 if self.fmt.is_float else self.fmt.num_groups(self.k)

    @property
    def words_per_group(self) -> int:
        """Words that share a scale; the last one may be partly padding."""
        return ceildiv(self.words, self.groups)

    @property
    def words_per_line(self) -> int:
        """Consecutive words that share the cache line of `word_address`."""
        lowest = self.fmt.planes[0]
        return 1 if lowest == self.fmt.bits else 8 // lowest

    @property
    def needs_sums(self) -> bool:
        """True where a group's sum of activations enters the product (minimum or zero point)."""
        return self.fmt.has_min or stored_zero_point(self.fmt) != 0

    def word(self, expert: Expr, panel: Expr, word: Expr) -> Expr:
        """Sixteen rows' words."""
        return self._word(expert, panel, word, lanes(i64(0)))

    def word_address(self, expert: Expr, panel: Expr, word: Expr) -> Expr:
        """Where a word vector lies; a word past the panel's last is in the next panel.

        Of codes in planes it is where their lowest bits lie.
        """
        name = "values" if self.fmt.is_float else "codes"
        if self.words_per_line > 1:
            word = T.floordiv(word, i64(self.words_per_line))
        return self.address(name, expert, panel, word)

    def ahead_address(
        self, expert: Expr, panel: Expr, word: Expr, following: Expr | None = None
    ) -> Expr:
        """`word_address` of a word past the panel's last one in `following`, if that is not the
        next panel.
        """
        if following is None:
            return self.word_address(expert, panel, word)
        is_over = T.Bind(word >= i64(self.words))
        panel = T.Select(is_over, following, panel)
        return self.word_address(expert, panel, word - T.Select(is_over, i64(self.words), i64(0)))

    def scale_address(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """Where sixteen rows' scales lie, or the lowest bits of their sub-scales."""
        if self.fmt.sub_scales is None:
            return self.address("scales", expert, panel, group)
        byte = T.floordiv(group, i64(8 // sub_scale_planes(self.fmt)[0]))
        return self.address("sub_scales", expert, panel, byte)

    def word_lines(self, expert: Expr, panel: Expr, word: Expr) -> list[Expr]:
        """Where the parts of a word vector lie, one for each plane of its codes; as in
        `word_address`, it may lie past the panel's last.
        """
        planes = self.fmt.planes if self.words_per_line > 1 else (8,)
        names = plane_suffixes("codes", planes)
        return [
            self.address(name, expert, panel, T.floordiv(word, i64(8 // bits)))
            for name, bits in zip(names, planes, strict=True)
        ]

    def scale_lines(self, expert: Expr, panel: Expr, group: Expr) -> list[Expr]:
        """Where sixteen rows' scales and minimums of a group lie, in all their parts."""
        subs = self.fmt.sub_scales
        if not self.fmt.group:
            return []
        found = []
        for name in ("scales", "mins") if self.fmt.has_min else ("scales",):
            per_scale = 1 if subs is None else subs.group // self.fmt.group
            found.append(self.address(name, expert, panel, T.floordiv(group, i64(per_scale))))
            planes = sub_scale_planes(self.fmt)
            for part, bits in zip(plane_suffixes(f"sub_{name}", planes), planes, strict=True):
                byte = T.floordiv(group, i64(8 // bits))
                found.append(self.address(part, expert, panel, byte))
        return found

    def address(self, name: str, expert: Expr, panel: Expr, index: Expr) -> Expr:
        """Where sixteen rows' numbers lie in the array of that suffix."""
        return T.address_of(self.buffers[name][self._index(expert, panel, index, i64(0))])

    def scalar_word(self, expert: Expr, row: Expr, word: Expr) -> Expr:
        """One row's word."""
        panel, lane = _place(row)
        return self._word(expert, panel, word, lane)

    def scale(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """Sixteen rows' scales, float32x16."""
        return self._scale("scales", expert, panel, group, lanes(i64(0)))

    def minimum(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """Sixteen rows' minimums, float32x16."""
        return self._scale("mins", expert, panel, group, lanes(i64(0)))

    def scalar_scale(self, expert: Expr, row: Expr, group: Expr) -> Expr:
        """One row's scale, float32."""
        panel, lane = _place(row)
        return self._scale("scales", expert, panel, group, lane)

    def scalar_minimum(self, expert: Expr, row: Expr, group: Expr) -> Expr:
        """One row's minimum, float32."""
        panel, lane = _place(row)
        return self._scale("mins", expert, panel, group, lane)

    def _word(self, expert: Expr, panel: Expr, word: Expr, lane: Expr) -> Expr:
        if self.fmt.is_float:
            return self.buffers["values"][self._index(expert, panel, word, lane)]
        planes = self.fmt.planes
        if planes == (self.fmt.bits,):
            return self.buffers["codes"][self._index(expert, panel, word, lane)]
        codes = self._joined("codes", planes, 0x01010101, expert, panel, word, lane)
        if self.fmt.codebook is None:
            return codes
        entries = [value + self.fmt.zero_code for value in self.fmt.codebook]
        if not isinstance(lane, tirx.Ramp):
            return lookup_scalar(entries, codes)
        assert self.table is not None, self.fmt.name
        return self.table.lookup(entries, codes)

    def _scale(self, name: str, expert: Expr, panel: Expr, group: Expr, lane: Expr) -> Expr:
        """Scales or minimums, float32."""
        subs = self.fmt.sub_scales
        per_super = 1 if subs is None else subs.group // self.fmt.group
        place = self._index(expert, panel, T.floordiv(group, i64(per_super)), lane)
        scale = _typed("float32", self.buffers[name][place], lane)
        if subs is None:
            return scale
        planes = sub_scale_planes(self.fmt)
        part = self._joined(f"sub_{name}", planes, 1, expert, panel, group, lane)
        if subs.zero_point:
            part = part - _each(T.int32(subs.zero_point), lane)
        return scale * _typed("float32", part, lane)

    def _joined(
        self,
        name: str,
        planes: tuple[int, ...],
        unit: int,
        expert: Expr,
        panel: Expr,
        index: Expr,
        lane: Expr,
    ) -> Expr:
        """Number `index` of what arrays hold in planes, as int32; `unit` has a one in each byte
        that is meant.
        """
        total: Expr | None = None
        base = 0
        for suffix, bits in zip(plane_suffixes(name, planes), planes, strict=True):
            fields = 8 // bits  # of a byte
            at = self._index(expert, panel, T.floordiv(index, i64(fields)), lane)
            part = _typed("int32", self.buffers[suffix][at], lane)
            if fields > 1:
                shift = T.Cast("int32", T.floormod(index, i64(fields))) * T.int32(bits)
                mask = T.int32(((1 << bits) - 1) * unit)
                part = T.bitwise_and(T.shift_right(part, _each(shift, lane)), _each(mask, lane))
            if base:
                part = T.shift_left(part, _each(T.int32(base), lane))
            total = part if total is None else T.bitwise_or(total, part)
            base += bits
        return total

    def _index(self, expert: Expr, *rest: Expr) -> tuple[Expr, ...]:
        return (expert, *rest) if self.stacked else rest

    def offset(self, expert: Expr, panel: Expr, group: Expr) -> Expr:
        """What the zero point and the minimum add to every weight of a group, float32x16."""
        zero = stored_zero_point(self.fmt)
        if zero == 0:
            return self.minimum(expert, panel, group)
        return self.scale(expert, panel, group) * splat(-float(zero))


def _place(row: Expr) -> tuple[Expr, Expr]:
    """(panel, lane) of a row."""
    return T.floordiv(row, i64(PANEL)), T.floormod(row, i64(PANEL))


def _each(value: Expr, lane: Expr) -> Expr:
    """`value` in as many lanes as the index `lane` has."""
    return T.broadcast(value, PANEL) if isinstance(lane, tirx.Ramp) else value


def _typed(dtype: str, value: Expr, lane: Expr) -> Expr:
    """`value` as a number, or a vector, of that type."""
    return T.Cast(f"{dtype}x{PANEL}" if isinstance(lane, tirx.Ramp) else dtype, value)


def k_block_words(weights: WeightPanels, k_block: int) -> int:
    """Words of one unpacked block: about `k_block` features, equal blocks, whole groups or equal
    parts of one.
    """
    unit = weights.words_per_group if weights.groups > 1 else gcd(8, weights.words)
    blocks = ceildiv(weights.words * weights.width, k_block)
    return min(weights.words, ceildiv(ceildiv(weights.words, blocks), unit) * unit)


def unpack_panel(
    weights: WeightPanels,
    expert: Expr,
    panel: Expr,
    block: Expr,
    block_words: int,
    store: Callable[[Expr, Expr], None],
) -> None:
    """Dequantizes words `block · block_words …` of a panel; `store(k, float32x16)` takes each
    feature.

    `k` counts from the block's first feature. The last block ends at the matrix' last word.
    """
    fmt, width = weights.fmt, weights.width
    first = block * i64(block_words)
    count: Expr = i64(block_words)
    if weights.words % block_words:
        count = T.min(count, i64(weights.words) - first)

    def words(start: Expr, extent: Expr, scales: list[Expr], offset: Expr | None) -> None:
        with T.serial(extent) as w:
            word = T.Bind(weights.word(expert, panel, first + start + w))
            for code in decode(fmt, word):
                value = code.value
                if offset is not None:
                    value = value * scales[code.exponent // fmt.bits] + offset
                store((start + w) * i64(width) + i64(code.offset), value)

    def grouped(group: Expr, start: Expr, extent: Expr) -> None:
        scale = T.Bind(weights.scale(expert, panel, group))
        # A code decodes to itself times a power of two, which its own copy of the scale takes back.
        scales = [
            T.Bind(scale * splat(2.0 ** -(p * fmt.bits))) if p else scale for p in range(width - 1)
        ]
        # The topmost code was shifted down and exponent 0 selects the plain scale.
        words(start, extent, scales, T.Bind(weights.offset(expert, panel, group)))

    per_group = weights.words_per_group
    if fmt.is_float:
        words(i64(0), count, [], None)
    elif weights.groups == 1:
        grouped(i64(0), i64(0), count)
    else:
        with T.serial(T.floordiv(count, i64(per_group))) as g:
            grouped(T.floordiv(first, i64(per_group)) + g, g * i64(per_group), i64(per_group))
