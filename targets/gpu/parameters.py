"""The tunable numbers of the GPU kernels and what the kernels know of a device: one table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from tvm.script.ir_builder import tirx as T

Expr = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a kernel may use of a device.

    Threads of a subgroup run together and read each other's registers; with a width of 1 every
    reduction goes through shared memory, which all devices have. `subgroup_extern` names the
    device's own reduction functions (sum, maximum); without them values are shuffled.
    """

    subgroup: int = 1
    subgroup_extern: tuple[str, str] | None = None
    max_threads: int = 256
    shared_bytes: int = 32768

    def combine_subgroup(self, value: Expr, is_maximum: bool) -> Expr:
        """The sum, or the maximum, of `value` over the subgroup; every thread gets it."""
        if self.subgroup_extern is not None:
            name = self.subgroup_extern[int(is_maximum)]
            return T.call_pure_extern("float32", name, value)
        mask = T.Bind(T.tvm_warp_activemask())
        offset = self.subgroup // 2
        while offset:
            other = T.tvm_warp_shuffle_xor(mask, value, offset, self.subgroup, self.subgroup)
            value = T.Bind(T.max(value, other) if is_maximum else value + other)
            offset //= 2
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvParameters:
    """Products of few tokens: blocks of 32 · splits threads."""

    splits: int = 4  # threads that share a row's chunks, a power of two; fewer for short rows
    panels: int = 2  # rows of a thread, each 32 apart: they share a load of activations
    token_tile: int = 4  # tokens that a block multiplies each loaded weight with

    def within(self, chunks: int) -> GemvParameters:
        """With as many splits as leave each thread two of a row's chunks."""
        splits = self.splits
        while splits > 1 and 2 * splits > chunks:
            splits //= 2
        return replace(self, splits=splits)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmParameters:
    """Products of many tokens: tiles of rows by tokens, thread_rows by thread_tokens a thread."""

    rows: int = 64
    tokens: int = 64
    depth: int = 16  # input features in shared memory at a time, a whole chunk at least
    thread_rows: int = 8
    thread_tokens: int = 8
    padding: int = (
        4  # of a feature's tokens in shared memory, so that banks differ; keeps reads aligned
    )

    def __post_init__(self) -> None:
        assert self.rows % 32 == 0, self
        assert self.rows % self.thread_rows == 0, self
        assert self.tokens % self.thread_tokens == 0, self

    @property
    def row_lanes(self) -> int:
        """Rows that a thread reads out of shared memory at once."""
        return math.gcd(self.thread_rows, 4)

    @property
    def token_lanes(self) -> int:
        """Tokens likewise."""
        return math.gcd(self.thread_tokens, 4)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.rows // self.thread_rows) * (self.tokens // self.thread_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParameters:
    """Paged attention: decodes by one thread a position, longer sequences by tiles."""

    decode_threads: int = 64
    decode_steps: int = 2  # positions of a thread before values are weighed
    decode_heads: int = 8  # most query heads of a block
    decode_parts: int = 1  # blocks that share the context of a sequence
    tile_rows: int = 32  # tokens times heads of a block
    tile_positions: int = 64  # positions scored at a time
    tile_threads: int = 128
    stage_floats: int = 1024  # shared memory that keys and values pass through


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """Choosing tokens from logits: a block for each part of a row."""

    part: int = 2048  # logits
    argmax_threads: int = 128
    merge_threads: int = 32
    histogram_threads: int = 32  # each has a histogram of its own in shared memory
    draw_threads: int = 64

    def __post_init__(self) -> None:
        assert self.histogram_threads & (self.histogram_threads - 1) == 0, self
        assert self.part % self.draw_threads == 0, self


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuParameters:
    """Tunables of one device; every value changes speed only."""

    features: Features = field(default_factory=Features)
    row_elements: int = 16  # of a row that a thread has, while there are threads for fewer
    min_row_threads: int = 32
    flat_threads: int = 128  # threads of a block in element-wise kernels
    gemv: GemvParameters = field(default_factory=lambda: GemvParameters(splits=8, panels=2))
    few: GemvParameters = field(default_factory=GemvParameters)
    gemm: GemmParameters = field(default_factory=GemmParameters)
    attention: AttentionParameters = field(default_factory=AttentionParameters)
    sampling: SamplingParameters = field(default_factory=SamplingParameters)

    def row_threads(self, elements: int) -> int:
        """Threads that share a row of so many elements: a power of two."""
        threads = self.min_row_threads
        while threads * self.row_elements < elements and 2 * threads <= self.features.max_threads:
            threads *= 2
        return threads
