"""What the engine gives out: deltas while it runs, outputs at the end, statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llmc.runtime.logprobs import TokenLogprob

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one step added to one choice of a request; `finish_reason` is set in its last delta.

    `text` may be empty while a character is incomplete or could begin a stop string, so texts and
    `token_ids` of one delta need not correspond; joined over all deltas they do. A stop token is
    among `token_ids`, but has no text.
    """

    request_id: str
    index: int  # of the choice
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None  # one for each of token_ids, where asked for
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int  # of the choice, so far
    # One for each token of the prompt (None for the first), in the first delta of choice 0.
    prompt_logprobs: list[TokenLogprob | None] | None = None


@dataclass(slots=True, kw_only=True)
class ChoiceOutput:
    """One of a request's n answers."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None

    def add(self, delta: Delta) -> None:
        """Appends a delta of this choice."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason = delta.finish_reason


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A finished request; `text`, `token_ids` and so on are its first choice's."""

    prompt_token_ids: list[int]
    choices: list[ChoiceOutput]
    prompt_logprobs: list[TokenLogprob | None] | None = None

    @property
    def text(self) -> str:
        """The first choice's text; empty where the artifact has no tokenizer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first choice's tokens, the stop token included."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """The first choice's log-probabilities, where asked for."""
        return self.choices[0].logprobs

    def add(self, delta: Delta) -> None:
        """Appends a delta of this request."""
        self.choices[delta.index].add(delta)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's state and what it has done since its start; names as in the metrics."""

    num_running: int  # sequences
    num_waiting: int
    kv_cache_usage_ratio: float  # of the fullest pool, 0 to 1
    num_steps_total: int
    num_preemptions_total: int
    prompt_tokens_total: int  # of prompts that were computed; recomputation is not counted
    generation_tokens_total: int
