"""The tunable numbers of products on tensor cores, by how many tokens there are."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


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


Step = FewTokens | ManyTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCorePlan:
    """Kernels by rising numbers of tokens: each with the most it serves, the last serves all."""

    steps: tuple[tuple[int, Step], ...]
    last: ManyTokens

    def __post_init__(self) -> None:
        assert all(a[0] < b[0] for a, b in pairwise(self.steps)), self

    @property
    def kernels(self) -> list[Step]:
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


def gemv_plan(k: int) -> GemvPlan:
    """Measured on an H200: long rows want more warps, which have less of x to prepare each."""
    if k >= 8192:
        return GemvPlan(warps=16, ahead=2, blocks=264)
    return GemvPlan(warps=8, ahead=2, blocks=396)


# Shared memory stays below 99 KiB, which devices of compute capability 8.6 and 12.0 have.
PLANS = {
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
