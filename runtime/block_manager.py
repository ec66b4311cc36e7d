"""Which page of which cache group holds which tokens of which sequence.

A sequence in the batch owns a *row* of the block tables. In each group it holds the half-open
range of columns `[first, end)`: column `b` is the page of tokens `b·N : (b+1)·N`. A group with a
window gives back the columns that no token to come can read, so `first` moves on; in the others it
stays 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from llmc.artifact import CacheGroup
from llmc.runtime.page_pool import PagePool
from llmc.runtime.step import Int32


def pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens` tokens from position 0 on."""
    return -(-num_tokens // page_size)


def span_pages(group: CacheGroup) -> int | None:
    """Most pages a windowed group holds to take one more token; None without a window.

    A query sees `window` tokens, itself included; a range of n tokens touches at most
    `ceil((n - 1) / N) + 1` pages.
    """
    if group.window is None:
        return None
    return pages_for(group.window - 1, group.page_size) + 1


def capacity_tokens(groups: Seq[CacheGroup], num_pages: Seq[int], limit: int) -> int:
    """Tokens the longest sequence can have when it has the pools for itself, at most `limit`."""
    for group, pages in zip(groups, num_pages, strict=True):
        span = span_pages(group)
        if span is None or pages < span:
            limit = min(limit, pages * group.page_size)
    return limit


class BlockManager:
    """Page tables of all sequences in the batch, and the pools behind them."""

    def __init__(
        self, groups: Seq[CacheGroup], num_pages: Seq[int], *, max_rows: int, max_length: int
    ) -> None:
        """`num_pages[g]` pages for group g, rows for `max_rows` times `max_length` tokens."""
        self.groups = list(groups)
        self.pools = [PagePool(n) for n in num_pages]
        self.max_length = capacity_tokens(groups, num_pages, max_length)
        columns = max((pages_for(max_length, g.page_size) for g in groups), default=1)
        self._tables: Int32 = np.zeros((len(self.groups), max_rows, columns), np.int32)
        self._first = [[0] * max_rows for _ in self.groups]
        self._end = [[0] * max_rows for _ in self.groups]
        self._free_rows = list(range(max_rows - 1, -1, -1))

    @property
    def usage_ratio(self) -> float:
        """Share of the fullest pool's pages that are held, 0 to 1."""
        return max((1 - p.num_free / p.num_pages for p in self.pools), default=0.0)

    def open(self) -> int:
        """Takes a row with no pages."""
        return self._free_rows.pop()

    def close(self, row: int) -> None:
        """Gives back a row and all its pages."""
        for g, pool in enumerate(self.pools):
            first, end = self._first[g][row], self._end[g][row]
            pool.free(self._tables[g, row, first:end])
            self._tables[g, row, first:end] = 0
            self._first[g][row] = self._end[g][row] = 0
        self._free_rows.append(row)

    def can_admit(self, num_tokens: int, headroom: int) -> bool:
        """Whether a new sequence of `num_tokens` fits and leaves `headroom` pages free a group."""
        for group, pool in zip(self.groups, self.pools, strict=True):
            need = pages_for(num_tokens, group.page_size)
            span = span_pages(group)
            if span is not None:
                need = min(need, span)
            if need + headroom > pool.num_free:
                return False
        return True

    def release(self, row: int, start: int) -> None:
        """Gives back the pages that no token at position `start` or later can read."""
        for g, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            if group.window is None:
                continue
            first = self._first[g][row]
            keep = min(max(0, start - group.window + 1) // group.page_size, self._end[g][row])
            if keep > first:
                pool.free(self._tables[g, row, first:keep])
                self._tables[g, row, first:keep] = 0
                self._first[g][row] = keep

    def room(self, row: int, start: int) -> int:
        """New tokens from position `start` on for which pages are held or free in every group."""
        room = self.max_length - start
        for g, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            room = min(room, (self._end[g][row] + pool.num_free) * group.page_size - start)
        return room

    def can_extend(self, ends: Mapping[int, int]) -> bool:
        """Whether there are pages for all tokens of each row before its end, row -> end."""
        if any(end > self.max_length for end in ends.values()):
            return False
        for g, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            wanted = (pages_for(e, group.page_size) - self._end[g][r] for r, e in ends.items())
            if sum(max(0, pages) for pages in wanted) > pool.num_free:
                return False
        return True

    def extend(self, row: int, end: int) -> None:
        """Takes the pages for all tokens before position `end`; `room` has said that they exist."""
        for g, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            held, wanted = self._end[g][row], pages_for(end, group.page_size)
            if wanted > held:
                self._tables[g, row, held:wanted] = pool.allocate(wanted - held)
                self._end[g][row] = wanted

    def tables(self, rows: npt.NDArray[np.intp], max_kv_len: int) -> Int32:
        """Block tables `[G, S, B]` int32 of `rows` `[S]`; B covers `max_kv_len` tokens."""
        columns = max((pages_for(max_kv_len, g.page_size) for g in self.groups), default=1)
        return np.ascontiguousarray(np.take(self._tables[:, :, :columns], rows, axis=1))

    def slots(self, rows: npt.NDArray[np.intp], positions: Int32) -> Int32:
        """Slots `[G, T]` int32 of tokens at `positions` `[T]` of the sequences in `rows` `[T]`."""
        slots = np.empty((len(self.groups), len(positions)), np.int32)
        for g, group in enumerate(self.groups):
            columns, places = np.divmod(positions, group.page_size)
            slots[g] = self._tables[g, rows, columns] * group.page_size + places
        return slots

    def check_invariants(self, lengths: dict[int, int]) -> None:
        """AssertionError unless `lengths` (row -> tokens with pages) and the pools agree."""
        max_rows = self._tables.shape[1]
        assert sorted([*lengths, *self._free_rows]) == list(range(max_rows)), (
            f"rows {sorted(lengths)} in use, {sorted(self._free_rows)} free, {max_rows} in all"
        )
        for g, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            held = []
            for row in range(max_rows):
                first, end = self._first[g][row], self._end[g][row]
                held.append(self._tables[g, row, first:end])
                assert not self._tables[g, row, :first].any(), f"group {g} row {row}: stale entry"
                assert not self._tables[g, row, end:].any(), f"group {g} row {row}: stale entry"
                assert first == 0 or group.window is not None, f"group {g} row {row} lost a page"
                tokens = lengths.get(row, 0)
                assert end == pages_for(tokens, group.page_size), (
                    f"group {g} row {row}: pages up to column {end} for {tokens} tokens"
                )
            pool.check_invariants(np.concatenate(held))
