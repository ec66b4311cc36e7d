"""What the next step computes.

One rule: `num_computed_tokens` catches up with `num_tokens` under a token budget. A prompt is a
sequence far behind and a decode one that is a single token behind; there is no prefill mode and no
decode mode.

Order is first come, first served. The running sequences are always older than the waiting ones:
only the newest is preempted, and only the oldest is admitted. So the oldest sequence computes at
least one token in every step, and no mix of requests can stop the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from llmc.runtime.block_manager import BlockManager
from llmc.runtime.sequence import Sequence, SequenceStatus
from llmc.runtime.step import Int32


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start : start + num_tokens` of a sequence; the last `num_logits_rows` want logits."""

    sequence: Sequence
    start: int
    num_tokens: int
    num_logits_rows: int

    @property
    def token_ids(self) -> Int32:
        """The tokens `[num_tokens]` int32; zeros where they are not known yet."""
        if self.start == self.sequence.num_tokens:
            return np.zeros(self.num_tokens, np.int32)
        return self.sequence.token_ids[self.start : self.end]

    @property
    def end(self) -> int:
        """Tokens in the caches after the step."""
        return self.start + self.num_tokens


class Scheduler:
    """Queues of sequences; `schedule` picks a batch and takes its pages."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_tokens: int,
        max_sequences: int,
        max_logits_rows: int,
    ) -> None:
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_logits_rows = max_logits_rows
        # Then every running sequence can decode in every step, and a prefill finds a token's room.
        self.max_sequences = min(max_sequences, max_batch_tokens, max_logits_rows)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its pages."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self.blocks.close(sequence.row)
            sequence.row = -1
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> list[Chunk]:
        """The next batch, sequences with one new token first; empty when there is nothing to do."""
        batch = _Batch(self.max_batch_tokens, self.max_logits_rows)
        # Decodes, then prefills, each by arrival: a long prompt never delays a decode.
        for sequence in sorted(self.running, key=lambda s: s.num_new_tokens > 1):
            if sequence.status is SequenceStatus.RUNNING:
                self._continue(sequence, batch)
        self._admit(batch)
        chunks = list(batch.chunks.values())
        return sorted(chunks, key=lambda c: c.num_tokens > 1)

    def schedule_ahead(self, decodes: Seq[Sequence]) -> list[Chunk]:
        """The batch behind one in which each of `decodes` computes its last token: each one's next,
        which is not known yet. Empty where that has to be waited for: somebody could be admitted,
        or there are not as many pages.
        """
        if self.waiting and len(decodes) < self.max_sequences:
            return []
        if not self.blocks.can_extend({s.row: s.num_tokens + 1 for s in decodes}):
            return []
        chunks = []
        for sequence in decodes:
            start = sequence.num_tokens
            self.blocks.release(sequence.row, start)
            self.blocks.extend(sequence.row, start + 1)
            sequence.num_ahead_tokens = 1
            chunks.append(Chunk(sequence, start, 1, 1))
        return chunks

    def _continue(self, sequence: Sequence, batch: _Batch) -> None:
        """Schedules a running sequence; makes room by preempting the newest, in the end itself."""
        if batch.num_tokens_left == 0:
            return
        while not self._take(sequence, batch):
            victim = self.running[-1]
            batch.drop(victim)
            self._preempt(victim)
            if victim is sequence:
                return

    def _admit(self, batch: _Batch) -> None:
        """Starts waiting sequences in their order while tokens, rows and pages last."""
        while self.waiting and len(self.running) < self.max_sequences and batch.num_tokens_left:
            sequence = self.waiting[0]
            # A page for each running one goes before a newcomer, who would soon be preempted.
            if not self.blocks.can_admit(sequence.num_tokens, headroom=len(self.running)):
                return
            self.waiting.popleft()
            sequence.row = self.blocks.open()
            sequence.status = SequenceStatus.RUNNING
            self.running.append(sequence)
            self._take(sequence, batch)

    def _take(self, sequence: Sequence, batch: _Batch) -> bool:
        """Adds the longest chunk that fits to the batch; False without pages for one token."""
        start = sequence.num_computed_tokens
        self.blocks.release(sequence.row, start)
        room = self.blocks.room(sequence.row, start)
        if room < 1:
            return False
        end = start + min(sequence.num_new_tokens, room, batch.num_tokens_left)
        # One token less is one row less, whether the rows score a prompt or sample a token.
        end -= max(0, sequence.num_logits_rows(end) - batch.num_rows_left)
        if end > start:
            self.blocks.extend(sequence.row, end)
            batch.add(Chunk(sequence, start, end - start, sequence.num_logits_rows(end)))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Frees a running sequence's pages; it waits at the head of the queue to be recomputed."""
        assert not sequence.num_ahead_tokens, "a step is under way with it"
        self.running.remove(sequence)
        self.blocks.close(sequence.row)
        sequence.row = -1
        sequence.num_computed_tokens = 0
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def check_invariants(self) -> None:
        """AssertionError unless queues, states and pages agree; to be called between two steps."""
        order = [s.arrival for s in (*self.running, *self.waiting)]
        assert order == sorted(set(order)), f"not by arrival: {order}"
        assert len(self.running) <= self.max_sequences, f"{len(self.running)} sequences run"
        assert all(s.status is SequenceStatus.RUNNING for s in self.running), "status"
        for sequence in self.waiting:
            assert sequence.status is SequenceStatus.WAITING, sequence.status
            assert sequence.row == -1, "a waiting sequence has a row"
            assert sequence.num_computed_tokens == 0, "a waiting sequence has pages"
        tokens = {s.row: s.num_computed_tokens + s.num_ahead_tokens for s in self.running}
        self.blocks.check_invariants(tokens)


class _Batch:
    """The chunks chosen so far and what is left of the budget."""

    def __init__(self, max_tokens: int, max_rows: int) -> None:
        self.num_tokens_left = max_tokens
        self.num_rows_left = max_rows
        self.chunks: dict[Sequence, Chunk] = {}

    def add(self, chunk: Chunk) -> None:
        self.chunks[chunk.sequence] = chunk
        self.num_tokens_left -= chunk.num_tokens
        self.num_rows_left -= chunk.num_logits_rows

    def drop(self, sequence: Sequence) -> None:
        """Takes back what a sequence was given in this step, if anything."""
        chunk = self.chunks.pop(sequence, None)
        if chunk is not None:
            self.num_tokens_left += chunk.num_tokens
            self.num_rows_left += chunk.num_logits_rows
