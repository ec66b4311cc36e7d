"""The pages of one cache group: which are free."""

from __future__ import annotations

import numpy as np

from llmc.runtime.step import Int32


class PagePool:
    """A stack of free page numbers; taking and returning pages costs one slice.

    A page has at most one holder today. Sharing would add a count per page here and nothing
    elsewhere: holders only ever call `allocate` and `free`.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"a pool needs at least one page, got {num_pages}")
        self.num_pages = num_pages
        self._stack: Int32 = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self._num_free = num_pages

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return self._num_free

    def allocate(self, count: int) -> Int32:
        """Takes `count` pages: their numbers `[count]` int32. The caller has checked `num_free`."""
        assert 0 <= count <= self._num_free, f"{count} pages wanted, {self._num_free} free"
        self._num_free -= count
        return self._stack[self._num_free : self._num_free + count].copy()

    def free(self, pages: Int32) -> None:
        """Returns `pages` `[n]` int32, all taken by `allocate` before."""
        end = self._num_free + len(pages)
        assert end <= self.num_pages, f"{len(pages)} pages returned to a pool that lacks fewer"
        self._stack[self._num_free : end] = pages
        self._num_free = end

    def check_invariants(self, held: Int32) -> None:
        """Every page is free or in `held` `[n]` int32 exactly once; AssertionError otherwise."""
        both = np.concatenate([self._stack[: self._num_free], held])
        counts = np.bincount(both, minlength=self.num_pages)
        wrong = np.flatnonzero(counts != 1)
        assert len(counts) == self.num_pages, f"page {both.max()} of {self.num_pages}"
        assert wrong.size == 0, (
            f"pages {wrong[:8].tolist()} have {counts[wrong[:8]].tolist()} places: "
            f"{self._num_free} free + {len(held)} held, {self.num_pages} pages"
        )
