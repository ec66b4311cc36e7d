"""Pages are handed out once, come back, and windows give theirs up."""

from __future__ import annotations

import numpy as np
import pytest

from llmc.artifact import CacheGroup
from llmc.runtime.block_manager import BlockManager, capacity_tokens
from llmc.runtime.page_pool import PagePool


def group(window: int | None, page_size: int) -> CacheGroup:
    return CacheGroup(name="g", window=window, page_size=page_size)


def test_a_pool_hands_out_each_page_once():
    pool = PagePool(10)
    first, second = pool.allocate(4), pool.allocate(6)
    assert sorted([*first, *second]) == list(range(10))
    pool.free(first)
    pool.check_invariants(second)
    with pytest.raises(AssertionError, match="free \\+"):
        pool.check_invariants(second[1:])
    with pytest.raises(AssertionError, match="places"):
        pool.check_invariants(np.append(second, second[:1]))


def test_groups_of_different_page_sizes_and_windows():
    blocks = BlockManager([group(None, 4), group(3, 2)], [8, 8], max_rows=2, max_length=32)
    row = blocks.open()
    blocks.extend(row, 9)
    assert [p.num_free for p in blocks.pools] == [5, 3]
    blocks.release(row, 9)  # position 9 sees 7, 8, 9: columns 0 to 2 of the window's are unread
    assert [p.num_free for p in blocks.pools] == [5, 6]
    blocks.check_invariants({row: 9})
    tables = blocks.tables(np.array([row]), 9)
    assert tables.shape == (2, 1, 5)
    assert tables[1, 0, :3].tolist() == [0, 0, 0]
    slots = blocks.slots(np.array([row]), np.array([8], np.int32))
    assert slots[:, 0].tolist() == [tables[0, 0, 2] * 4, tables[1, 0, 4] * 2]
    blocks.close(row)
    assert [p.num_free for p in blocks.pools] == [8, 8]
    assert not blocks._tables.any()


def test_room_is_what_held_and_free_pages_hold():
    blocks = BlockManager([group(None, 4)], [3], max_rows=2, max_length=100)
    assert blocks.max_length == 12
    one, two = blocks.open(), blocks.open()
    blocks.extend(one, 5)
    assert blocks.room(one, 5) == 7
    assert blocks.room(two, 0) == 4
    assert blocks.can_admit(4, headroom=0)
    assert not blocks.can_admit(4, headroom=1)
    assert not blocks.can_admit(5, headroom=0)
    assert blocks.usage_ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("window", "pages", "expected"),
    [(None, 5, 20), (5, 2, 100), (6, 2, 8), (6, 3, 100), (1, 1, 100), (4, 1, 4)],
)
def test_the_capacity_of_a_windowed_pool_is_unlimited_once_it_spans_the_window(
    window, pages, expected
):
    assert capacity_tokens([group(window, 4)], [pages], 100) == expected
