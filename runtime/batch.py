"""Turns scheduled chunks into the arrays of one step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from llmc.runtime.block_manager import BlockManager
from llmc.runtime.scheduler import Chunk
from llmc.runtime.step import Int32, StepInputs


def build_batch(chunks: Seq[Chunk], blocks: BlockManager) -> StepInputs:
    """The step's arguments (docs/shapes.md) for `chunks`, one-token chunks first, pages taken.

    Python work is per sequence; what grows with tokens or context is NumPy's.
    """
    rows = np.array([c.sequence.row for c in chunks], np.intp)
    starts = np.array([c.start for c in chunks], np.int32)
    q_lens = np.array([c.num_tokens for c in chunks], np.int32)
    num_rows = np.array([c.num_logits_rows for c in chunks], np.int32)
    q_starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(q_lens, out=q_starts[1:])
    kv_lens = starts + q_lens
    max_kv_len = int(kv_lens.max())
    positions = _ranges(starts, q_lens)
    logits_rows = _ranges(q_starts[1:] - num_rows, num_rows)
    if logits_rows.size == 0:  # parts of prompts only; a step has at least one row, here unread
        logits_rows = np.zeros(1, np.int32)
    return StepInputs(
        input_ids=np.concatenate([c.token_ids for c in chunks]),
        positions=positions,
        q_starts=q_starts,
        kv_lens=kv_lens,
        block_tables=blocks.tables(rows, max_kv_len),
        slots=blocks.slots(np.repeat(rows, q_lens), positions),
        state_slots=np.full(len(chunks), -1, np.int32),
        logits_rows=logits_rows,
        num_decodes=int((q_lens == 1).sum()),
        max_q_len=int(q_lens.max()),
        max_kv_len=max_kv_len,
    )


def _ranges(starts: Int32, lengths: Int32) -> Int32:
    """`starts[i] … starts[i] + lengths[i] - 1` for every i, concatenated, int32."""
    ends = np.cumsum(lengths, dtype=np.int32)
    offsets = np.repeat(starts - (ends - lengths), lengths)
    ranges: Int32 = np.arange(len(offsets), dtype=np.int32) + offsets
    return ranges
