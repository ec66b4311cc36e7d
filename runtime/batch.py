"""Turns scheduled chunks into the arrays of one step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
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
    max_q_len, max_kv_len = max(q_lens), max(ends)
    q_starts = np.array([0, *itertools.accumulate(q_lens)], np.int32)
    rows = np.array([c.sequence.row for c in chunks], np.intp)
    if max_q_len == 1 == min(num_rows):  # the commonest step, and the shortest
        positions, token_rows, logits_rows = np.array(starts, np.int32), rows, q_starts[:-1]
    else:
        positions = _ranges(starts, q_lens)
        token_rows = np.repeat(rows, q_lens)
        logits_rows = _ranges(q_starts[1:] - num_rows, num_rows)
        if not len(logits_rows):  # parts of prompts only: a step has at least one row, here unread
            logits_rows = np.zeros(1, np.int32)
    return StepInputs(
        input_ids=np.concatenate([c.token_ids for c in chunks]),
        positions=positions,
        q_starts=q_starts,
        kv_lens=np.array(ends, np.int32),
        block_tables=blocks.tables(rows, max_kv_len),
        slots=blocks.slots(token_rows, positions),
        state_slots=np.full(len(chunks), -1, np.int32),
        logits_rows=logits_rows,
        num_decodes=q_lens.count(1),
        max_q_len=max_q_len,
        max_kv_len=max_kv_len,
    )


def _ranges(starts: Iterable[int], lengths: Iterable[int]) -> Int32:
    """`starts[i] … starts[i] + lengths[i] - 1` for every i, concatenated, int32."""
    return np.concatenate(
        [np.arange(s, s + n, dtype=np.int32) for s, n in zip(starts, lengths, strict=True)]
    )
