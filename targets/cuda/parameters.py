"""The tunable numbers of kernels on tensor cores: of products and of attention."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class FewTokens:
    """A panel of 32 rows a block, whose warps share the input features."""

    tokens: int  # of a block, a multiple of 8
    warps: int = 8
    ahead: int = 2  # superblocks of weights that a thread loads before it multiplies

    @property
    def rows(self) -> int:
        """Output rows of a block."""
        return 32

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def depth(self) -> int:
        """Superblocks that activations are filled up to."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyTokens:
    """Rows by tokens a block, of them warp_rows by warp_tokens a warp, in shared memory."""

    rows: int
    tokens: int
    warp_rows: int
    warp_tokens: int
    depth: int  # superblocks (of 32, 64 or 128 features for 16, 8, 4 bits) at a time
    stages: int  # of them in shared memory

    def __post_init__(self) -> None:
        assert self.rows % 32 == 0, self
        assert self.rows % self.warp_rows == 0, self
        assert self.tokens % self.warp_tokens == 0, self
        assert self.warp_rows % 16 == 0, self
        assert self.warp_tokens % 8 == 0, self
        assert self.stages >= 2, self

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.rows // self.warp_rows) * (self.tokens // self.warp_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class WideTokens:
    """256 rows a block, copied in bulk (sm_90 and newer): see kernels/wide.cuh."""

    tokens: int  # of a block, a multiple of 16
    chunks: int  # of a row in a stage
    stages: int  # in shared memory
    blocks: int = 132  # at once

    def __post_init__(self) -> None:
        assert self.tokens in (16, 32, 64, 128), self
        assert self.chunks % 4 == 0, self
        assert 2 <= self.stages <= 8, self

    @property
    def rows(self) -> int:
        """Output rows of a block."""
        return 256

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, and four warps for one that copies."""
        return 384


Step = FewTokens | ManyTokens
S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCorePlan(Generic[S]):
    """Kernels by rising numbers of tokens: each with the most it serves, the last serves all."""

    steps: tuple[tuple[int, S], ...]
    last: S

    def __post_init__(self) -> None:
        assert all(a[0] < b[0] for a, b in pairwise(self.steps)), self

    @property
    def kernels(self) -> list[S]:
        """All of them, in order."""
        return [*(step for _, step in self.steps), self.last]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePlan:
    """Attention of single new tokens: a context is cut until there are blocks for the device."""

    warps: int = 4  # of a block, which take the pages of a part in turns
    blocks: int = 264  # two for each of 132 multiprocessors
    parts: int = 32  # of a context at most


@dataclass(frozen=True, slots=True, kw_only=True)
class GemvPlan:
    """Products of one token: blocks that stay, each with all of x in shared memory."""

    warps: int  # that share a tile's features
    ahead: int  # superblocks that a thread loads before it multiplies
    blocks: int  # as many as 132 multiprocessors hold at once

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps


def gemv_plan(k: int) -> GemvPlan:
    """Measured on an H200: long rows want more warps, which have less of x to prepare each."""
    if k >= 8192:
        return GemvPlan(warps=16, ahead=2, blocks=264)
    return GemvPlan(warps=8, ahead=2, blocks=396)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPlan:
    """Products of one token on sm_90: see kernels/stream.cuh."""

    cluster: int  # blocks that share a panel's features
    blocks: int
    stages: int  # in shared memory
    chunks: int = 32  # of a panel in a stage

    def __post_init__(self) -> None:
        assert self.blocks % self.cluster == 0, self
        assert 2 <= self.stages <= 8, self

    @property
    def threads(self) -> int:
        """Threads of a block: those that multiply, and a warp that copies."""
        return 288


# Clusters of so many blocks, one a multiprocessor, that run at once: an H200 reports 66, 39, 30, 17
# and 15. One more waits until another has ended.
WIDE_CLUSTERS = {2: 66, 3: 39, 4: 30, 6: 16, 8: 14}
# Clusters of so many blocks for products of one token; those of four put two blocks on some of an
# H200's multiprocessors.
CLUSTERS = {1: 132, 2: 66, 4: 32}
STREAM_BYTES = 113 * 1024
"""Shared memory of a block: two fit a multiprocessor, and all ask for as much. What is left of a
multiprocessor's memory is cache, and to divide it anew takes one without blocks. Where products
divided it differently, the blocks of the next went two by two to those that were free, and half of
the multiprocessors had nothing to do.
"""


# Shared memory stays below 99 KiB, which devices of compute capability 8.6 and 12.0 have.
PLANS: dict[int, TensorCorePlan[Step]] = {
    16: TensorCorePlan(
        steps=(
            (8, FewTokens(tokens=8, ahead=4)),
            (16, FewTokens(tokens=16, ahead=4)),
            (64, FewTokens(tokens=64, ahead=2)),
        ),
        last=ManyTokens(rows=128, tokens=128, warp_rows=64, warp_tokens=32, depth=1, stages=5),
    ),
    8: TensorCorePlan(
        steps=(
            (8, FewTokens(tokens=8, ahead=4)),
            (16, FewTokens(tokens=16, ahead=2)),
            (64, FewTokens(tokens=64, ahead=1)),
        ),
        last=ManyTokens(rows=128, tokens=128, warp_rows=64, warp_tokens=32, depth=1, stages=3),
    ),
    4: TensorCorePlan(
        steps=(
            (8, FewTokens(tokens=8, ahead=4)),
            (16, FewTokens(tokens=16, ahead=2)),
            (64, FewTokens(tokens=64, ahead=1)),
        ),
        last=ManyTokens(rows=128, tokens=128, warp_rows=64, warp_tokens=32, depth=1, stages=2),
    ),
}
"""The plan by the bits of a weight."""


def _wide(*stages: tuple[int, int, int]) -> TensorCorePlan[WideTokens]:
    """Of (tokens of a block, chunks of a stage, stages)."""
    *short, last = (WideTokens(tokens=t, chunks=c, stages=s) for t, c, s in stages)
    # Of one kernel: clusters are of another size where there are more tiles.
    several = ((tokens, last) for tokens in (128, 256, 512))
    return TensorCorePlan(steps=(*((step.tokens, step) for step in short), *several), last=last)


WIDE_PLANS = {
    16: _wide((16, 8, 6), (32, 8, 5), (64, 8, 5), (128, 8, 4)),
    8: _wide((16, 4, 6), (32, 4, 6), (64, 4, 5), (128, 4, 4)),
    4: _wide((16, 8, 4), (32, 8, 4), (64, 8, 3), (128, 4, 4)),
}
"""Plans for sm_90 alone, whose blocks may have 227 KiB; measured on an H200."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashPlan:
    """Tiles of 16 rows a warp over blocks of positions: group_positions at a time where groups of
    four warps multiply together (sm_90), positions elsewhere.
    """

    warps: int
    positions: int = 64
    stages: int = 2  # blocks of keys and values in shared memory
    group_positions: int = 64

    def __post_init__(self) -> None:
        assert self.warps % 4 == 0, self
        assert self.positions % 16 == 0, self
        assert self.stages >= 2, self
        assert self.group_positions in (16, 32, 64, 128), self

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 16 * self.warps

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps


FLASH_PLANS = (
    (96, 96, FlashPlan(warps=8)),
    (128, 128, FlashPlan(warps=12)),
    (128, 128, FlashPlan(warps=8)),
    (192, 192, FlashPlan(warps=8, positions=32)),
    (192, 192, FlashPlan(warps=8, positions=32, group_positions=32)),
    (256, 256, FlashPlan(warps=8, positions=32)),
    (256, 256, FlashPlan(warps=8, positions=32, group_positions=32)),
    (256, 256, FlashPlan(warps=4, positions=32, group_positions=32)),
)
"""Most features of keys and of values; the first plan serves that finds its shared memory."""

SHARED_KIB = {"sm_80": 99, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
"""Shared memory that a block may have on every device that runs the architecture's machine code:
that of sm_80, which has 163 KiB, runs on sm_86 and sm_89 too.
"""
