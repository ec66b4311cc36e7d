"""Logits of a given text: nothing is scheduled and nothing sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmc.errors import CapacityError
from llmc.runtime.batch import build_batch
from llmc.runtime.block_manager import BlockManager
from llmc.runtime.scheduler import Chunk
from llmc.runtime.sequence import Sequence
from llmc.runtime.step import Float32, Int32, StepExecutor


def score_text(
    executor: StepExecutor,
    blocks: BlockManager,
    token_ids: Int32,
    *,
    chunk_tokens: int,
    max_logits_rows: int,
) -> Iterator[tuple[int, Float32]]:
    """Parts `(start, logits [n, V])` of the logits after each of `token_ids` `[T]`, in order.

    Computes `chunk_tokens` tokens a step, in pages of its own that it frees at the end.
    CapacityError where running requests leave too few.
    """
    sequence = Sequence(token_ids, arrival=-1)
    sequence.row = blocks.open()
    try:
        for start in range(0, len(token_ids), chunk_tokens):
            num_tokens = min(chunk_tokens, len(token_ids) - start)
            blocks.release(sequence.row, start)
            if blocks.room(sequence.row, start) < num_tokens:
                raise CapacityError(
                    f"{len(token_ids)} tokens do not fit the KV cache beside the running requests",
                    hint="wait until they are done, or start with more kv_cache_tokens",
                )
            blocks.extend(sequence.row, start + num_tokens)
            inputs = build_batch([Chunk(sequence, start, num_tokens, num_tokens)], blocks)
            # A chunk with more rows than a step gives runs again for the next ones: writing the
            # same keys and values into the same slots changes nothing.
            for row in range(0, num_tokens, max_logits_rows):
                part = inputs.logits_rows[row : row + max_logits_rows]
                yield start + row, executor.step(replace(inputs, logits_rows=part))
    finally:
        blocks.close(sequence.row)
