"""One sequence of tokens: what is known of it and what the caches hold of it."""

from __future__ import annotations

import enum

import numpy as np

from llmc.runtime.step import Int32


class SequenceStatus(enum.Enum):
    """Where a sequence stands; a preempted one is waiting again."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Prompt and generated tokens, `num_computed_tokens` of which are in the caches."""

    __slots__ = (
        "_tokens",
        "arrival",
        "num_ahead_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_scored_tokens",
        "num_tokens",
        "row",
        "score_prompt",
        "status",
    )

    def __init__(self, prompt: Int32, *, arrival: int, score_prompt: bool = False) -> None:
        """`prompt` `[n]` int32, not empty; `arrival` orders sequences."""
        self._tokens: Int32 = prompt
        self.arrival = arrival
        self.num_prompt_tokens = len(prompt)
        self.num_tokens = len(prompt)
        self.num_computed_tokens = 0
        self.num_ahead_tokens = 0  # that have pages for a step which began ahead
        self.score_prompt = score_prompt  # wants the logits of its prompt
        self.num_scored_tokens = 0  # prompt positions whose logits have been read
        self.status = SequenceStatus.WAITING
        self.row = -1  # of the block tables, while running

    @property
    def token_ids(self) -> Int32:
        """All tokens `[num_tokens]` int32, as a view."""
        return self._tokens[: self.num_tokens]

    @property
    def num_new_tokens(self) -> int:
        """Tokens that are known, but not yet in the caches."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Tokens after the prompt."""
        return self.num_tokens - self.num_prompt_tokens

    def append(self, token_id: int) -> None:
        """Adds a generated token; the storage doubles, so n appends cost O(n)."""
        if self.num_tokens == len(self._tokens):
            grown = np.empty(max(16, 2 * self.num_tokens), np.int32)
            grown[: self.num_tokens] = self._tokens
            self._tokens = grown
        self._tokens[self.num_tokens] = token_id
        self.num_tokens += 1

    def num_logits_rows(self, end: int) -> int:
        """Logits rows that computing up to `end` calls for: always the chunk's last ones."""
        if self.score_prompt and self.num_scored_tokens < self.num_prompt_tokens - 1:
            first = max(self.num_computed_tokens, self.num_scored_tokens)
            return max(0, end - first)
        return int(end == self.num_tokens)
