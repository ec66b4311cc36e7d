"""The tunable numbers of products on simdgroup matrices."""

from __future__ import annotations

from dataclasses import dataclass

SIMDGROUP = 32
"""Threads of a simdgroup, on every GPU of Apple's."""
TILE = 8
"""Rows and columns of a simdgroup matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimdgroupParameters:
    """Tiles of rows by tokens a block, group_rows by group_tokens of them a simdgroup."""

    rows: int = 64
    tokens: int = 32
    group_rows: int = 32
    group_tokens: int = 16
    depth: int = 32  # input features in threadgroup memory at a time, a whole chunk at least

    def __post_init__(self) -> None:
        assert self.rows % 32 == 0, self
        assert self.rows % self.group_rows == 0, self
        assert self.tokens % self.group_tokens == 0, self
        assert self.group_rows % TILE == 0, self
        assert self.group_tokens % TILE == 0, self
        assert self.depth % TILE == 0, self

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return SIMDGROUP * (self.rows // self.group_rows) * (self.tokens // self.group_tokens)
