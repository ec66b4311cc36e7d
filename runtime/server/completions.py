"""POST /v1/completions: text, or its log-probabilities, from one or many prompts."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmc.runtime.outputs import ChoiceOutput, RequestOutput
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.server.answer import (
    EventStream,
    collect,
    until_disconnect,
    usage,
    visible_logprobs,
)
from llmc.runtime.server.engine_thread import PromptDelta
from llmc.runtime.server.errors import invalid
from llmc.runtime.server.logprobs import CompletionLogprobs
from llmc.runtime.server.model import ServedModel
from llmc.runtime.server.requests import CompletionRequest, parse


async def complete(model: ServedModel, request: Request, body: dict[str, Any]) -> Response:
    """Answers one completion request."""
    asked = parse(CompletionRequest, body)
    model.check_name(asked.model)
    params = asked.sampling_params(model.engine)
    if asked.stream and asked.echo and asked.logprobs is not None:
        raise invalid("echo with logprobs is not supported in a stream", param="stream")
    prompts = await model.encode(asked.prompts, params)
    texts = [_prompt_text(model, given) for given in asked.prompts] if asked.echo else None
    answer = _Answer(model=model, asked=asked, params=params, prompts=prompts, echoed=texts)
    if asked.stream:
        return EventStream(model.thread.generate(prompts, params), _Chunks(answer))
    outputs = await until_disconnect(request.receive, collect(model.thread, prompts, params))
    return JSONResponse(answer.whole(outputs))


def _prompt_text(model: ServedModel, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """One request and what all of its answer's parts have in common."""

    model: ServedModel
    asked: CompletionRequest
    params: SamplingParams
    prompts: list[list[int]]
    echoed: list[str] | None
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A response or a chunk around `choices`."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The response; choices count through prompts, then through each prompt's n."""
        choices = [
            self._choice(index, output, choice)
            for index, output in enumerate(outputs)
            for choice in output.choices
        ]
        num_generated = sum(len(c.token_ids) for output in outputs for c in output.choices)
        return {
            **self.envelope(choices),
            "usage": usage(sum(map(len, self.prompts)), num_generated),
        }

    def choice(
        self, prompt: int, index: int, text: str, logprobs: object, finish_reason: str | None
    ) -> dict[str, Any]:
        """An entry of `choices`."""
        return {
            "index": prompt * self.params.n + index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _choice(self, prompt: int, output: RequestOutput, choice: ChoiceOutput) -> dict[str, Any]:
        text = choice.text if self.echoed is None else self.echoed[prompt] + choice.text
        return self.choice(
            prompt, choice.index, text, self._logprobs(prompt, output, choice), choice.finish_reason
        )

    def _logprobs(
        self, prompt: int, output: RequestOutput, choice: ChoiceOutput
    ) -> dict[str, list[Any]] | None:
        if self.asked.logprobs is None:
            return None
        writer = CompletionLogprobs(self.model.tokenizer)
        entries = visible_logprobs(
            choice.logprobs,
            finish_reason=choice.finish_reason,
            is_stop=lambda token_id: self.model.is_stop(self.params, token_id),
        )
        if output.prompt_logprobs is None:
            return writer.of(entries)
        result = writer.of_prompt(self.prompts[prompt], output.prompt_logprobs)
        for name, items in writer.of(entries).items():
            result[name] += items
        return result


class _Chunks:
    """The chunks of a streamed completion."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._logprobs: dict[tuple[int, int], CompletionLogprobs] = {}
        self._seen: set[tuple[int, int]] = set()
        self._num_generated = 0

    def chunks(self, item: PromptDelta) -> list[dict[str, Any]]:
        """At most one: a delta without text, end or log-probabilities says nothing."""
        answer, delta, key = self._answer, item.delta, (item.prompt, item.delta.index)
        self._num_generated += len(delta.token_ids)
        text = delta.text
        if key not in self._seen and answer.echoed is not None:
            text = answer.echoed[item.prompt] + text
        self._seen.add(key)
        logprobs = None
        if answer.asked.logprobs is not None:
            entries = visible_logprobs(
                delta.logprobs,
                finish_reason=delta.finish_reason,
                is_stop=lambda token_id: answer.model.is_stop(answer.params, token_id),
            )
            writer = self._logprobs.setdefault(key, CompletionLogprobs(answer.model.tokenizer))
            logprobs = writer.of(entries) if entries else None
        if not text and logprobs is None and delta.finish_reason is None:
            return []
        choice = answer.choice(item.prompt, delta.index, text, logprobs, delta.finish_reason)
        return [self._envelope([choice], None)]

    def last(self) -> list[dict[str, Any]]:
        """The usage, where it was asked for."""
        if not self._answer.asked.include_usage:
            return []
        return [self._envelope([], usage(sum(map(len, self._answer.prompts)), self._num_generated))]

    def _envelope(
        self, choices: list[dict[str, Any]], used: dict[str, int] | None
    ) -> dict[str, Any]:
        chunk = self._answer.envelope(choices)
        return {**chunk, "usage": used} if self._answer.asked.include_usage else chunk
