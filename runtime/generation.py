"""One choice of a request while it runs: its tokens become text, and it learns when to stop."""

from __future__ import annotations

from collections.abc import Iterable

from llmc.runtime.detokenizer import Detokenizer
from llmc.runtime.logprobs import TokenLogprob, token_logprob
from llmc.runtime.outputs import Delta, FinishReason
from llmc.runtime.sampler import Draw, TokenSampler
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.sequence import Sequence
from llmc.runtime.step import Float32
from llmc.runtime.stop import StopFinder


class Generation:
    """Sequence, sampler, detokenizer and stop rules of one choice; makes its deltas."""

    def __init__(
        self,
        request_id: str,
        index: int,
        sequence: Sequence,
        params: SamplingParams,
        *,
        model_stop_ids: Iterable[int],
        max_length: int,
        detokenizer: Detokenizer | None,
    ) -> None:
        """`max_length`: most tokens of prompt and answer; no detokenizer, no text."""
        self.request_id = request_id
        self.index = index
        self.sequence = sequence
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_ids.update(model_stop_ids)
        self._max_generated = min(params.max_tokens, max_length - sequence.num_prompt_tokens)
        self._sampler = TokenSampler(
            params, sequence.token_ids, index=index, stop_ids=self._stop_ids
        )
        self._detokenizer = detokenizer
        self._stops = StopFinder(params.stop)
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        if sequence.score_prompt:
            self._prompt_logprobs = [None]

    def score_prompt(self, logits: Float32) -> None:
        """Takes the next prompt positions' logits `[n, V]`, in order, each position once."""
        assert self._prompt_logprobs is not None
        num_top = self._params.prompt_logprobs or 0
        tokens = self.sequence.token_ids
        for row in logits:
            token_id = int(tokens[len(self._prompt_logprobs)])
            self._prompt_logprobs.append(token_logprob(row, token_id, num_top))
        self.sequence.num_scored_tokens += len(logits)

    def advance(self, logits: Float32) -> Delta:
        """Samples the next token from `logits` `[V]`, appends it and gives the delta."""
        if self._max_generated == 0:  # only the prompt was to be scored
            return self._delta("", [], "length")
        token_id = self._sampler.sample(logits)
        logprobs = None
        if self._params.logprobs is not None:
            logprobs = [token_logprob(logits, token_id, self._params.logprobs)]
        return self._append(token_id, logprobs)

    def draw(self) -> Draw | None:
        """What a device needs to know to choose the next token; None where it cannot."""
        params = self._params
        if params.logprobs is not None or params.prompt_logprobs is not None:
            return None
        return self._sampler.draw()

    def goes_on(self) -> bool:
        """Whether another token follows the next one, unless that ends the text."""
        return self.sequence.num_generated_tokens + 1 < self._max_generated

    def take(self, token_id: int) -> Delta:
        """Appends a token that a device chose and gives the delta."""
        self._sampler.note(token_id)
        return self._append(token_id, None)

    def _append(self, token_id: int, logprobs: list[TokenLogprob] | None) -> Delta:
        self.sequence.append(token_id)
        text, reason = self._accept(token_id)
        return self._delta(text, [token_id], reason, logprobs)

    def end(self, reason: FinishReason) -> Delta:
        """The last delta of a choice that ends for a reason of the engine's."""
        self._prompt_logprobs = None  # perhaps not all of them
        return self._delta("", [], reason)

    def _accept(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text a new token gives and whether it is the last."""
        num_generated = self.sequence.num_generated_tokens
        if token_id in self._stop_ids:
            return self._rest(), "stop"
        text = "" if self._detokenizer is None else self._detokenizer.feed(token_id)
        if num_generated >= self._params.min_tokens:
            text, stopped = self._stops.feed(text)
            if stopped:
                return text, "stop"
        if num_generated >= self._max_generated:
            return text + self._rest(), "length"
        return text, None

    def _rest(self) -> str:
        """What detokenizer and stop finder hold back, when no more tokens come."""
        if self._detokenizer is None:
            return ""
        text, stopped = self._stops.feed(self._detokenizer.flush())
        return text if stopped else text + self._stops.flush()

    def _delta(
        self,
        text: str,
        token_ids: list[int],
        reason: FinishReason | None,
        logprobs: list[TokenLogprob] | None = None,
    ) -> Delta:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        self.finish_reason = reason
        return Delta(
            request_id=self.request_id,
            index=self.index,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            num_prompt_tokens=self.sequence.num_prompt_tokens,
            num_generated_tokens=self.sequence.num_generated_tokens,
            prompt_logprobs=prompt_logprobs,
        )
