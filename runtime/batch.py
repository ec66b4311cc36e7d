"""Turns scheduled chunks into the arrays of one step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq

import numpy as np

from llmc.runtime.block_manager import BlockManager
from llmc.runtime.scheduler import Chunk
from llmc.runtime.step import Int32, StepInputs


def build_batch(chunks: Seq[Chunk], blocks: BlockManager) -> StepInputs:
    """The step's arguments (docs/shapes.md) for `chunks`, one-token chunks first, pages taken.

    Python work is per sequence; what grows with tokens or context is NumPy's.
    """
    starts = [c.start for c in chunks]
    q_lens = [c.num_tokens for c in chunks]
    ends = [c.end for c in chunks]
    num_rows = [c.num_logits_rows for c in chunks]
    q_starts = [0, *itertools.accumulate(q_lens)]
    positions = _ranges(starts, q_lens)
    # Parts of prompts only want no logits; a step has at least one row, here unread.
    first_rows = [end - count for end, count in zip(q_starts[1:], num_rows, strict=True)]
    logits_rows = _ranges(first_rows, num_rows) if any(num_rows) else np.zeros(1, np.int32)
    max_kv_len = max(ends)
    rows = np.array([c.sequence.row for c in chunks], np.intp)
    return StepInputs(
        input_ids=np.concatenate([c.token_ids for c in chunks]),
        positions=positions,
        q_starts=np.array(q_starts, np.int32),
        kv_lens=np.array(ends, np.int32),
        block_tables=blocks.tables(rows, max_kv_len),
        slots=blocks.slots(np.repeat(rows, q_lens), positions),
        state_slots=np.full(len(chunks), -1, np.int32),
        logits_rows=logits_rows,
        num_decodes=q_lens.count(1),
        max_q_len=max(q_lens),
        max_kv_len=max_kv_len,
    )


def _ranges(starts: Seq[int], lengths: Seq[int]) -> Int32:
    """`starts[i] … starts[i] + lengths[i] - 1` for every i, concatenated, int32."""
    if max(lengths) == min(lengths) == 1:  # a decode: the commonest step, and the shortest
        return np.array(starts, np.int32)
    return np.concatenate(
        [np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, lengths, strict=True)]
    )
