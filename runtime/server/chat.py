"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from llmc.runtime.logprobs import TokenLogprob
from llmc.runtime.outputs import RequestOutput
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.server.answer import (
    EventStream,
    collect,
    until_disconnect,
    usage,
    visible_logprobs,
)
from llmc.runtime.server.engine_thread import PromptDelta
from llmc.runtime.server.logprobs import chat_logprobs
from llmc.runtime.server.model import ServedModel
from llmc.runtime.server.requests import ChatRequest, parse


async def chat(model: ServedModel, request: Request, body: dict[str, Any]) -> Response:
    """Answers one chat request."""
    asked = parse(ChatRequest, body)
    model.check_name(asked.model)
    # Once without the prompt: a wrong parameter should not cost a rendered template.
    asked.sampling_params(model.engine, room_tokens=1)
    prompt = await model.encode_chat([message.for_template() for message in asked.messages])
    params = asked.sampling_params(model.engine, room_tokens=model.room_tokens(prompt))
    prompts = await model.encode([prompt], params)
    answer = _Answer(model=model, asked=asked, params=params, num_prompt_tokens=len(prompt))
    if asked.stream:
        return EventStream(model.thread.generate(prompts, params), _Chunks(answer))
    outputs = await until_disconnect(request.receive, collect(model.thread, prompts, params))
    return JSONResponse(answer.whole(outputs[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """One request and what all of its answer's parts have in common."""

    model: ServedModel
    asked: ChatRequest
    params: SamplingParams
    num_prompt_tokens: int
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A response or a chunk around `choices`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model.name,
            "choices": choices,
        }

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        """The response."""
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self.logprobs(choice.logprobs, choice.finish_reason),
                "finish_reason": choice.finish_reason,
            }
            for choice in output.choices
        ]
        num_generated = sum(len(choice.token_ids) for choice in output.choices)
        return {
            **self.envelope("chat.completion", choices),
            "usage": usage(self.num_prompt_tokens, num_generated),
        }

    def logprobs(
        self, entries: list[TokenLogprob] | None, finish_reason: str | None
    ) -> dict[str, Any] | None:
        """`logprobs` of a choice, where they were asked for."""
        if not self.asked.logprobs:
            return None
        visible = visible_logprobs(
            entries,
            finish_reason=finish_reason,
            is_stop=lambda token_id: self.model.is_stop(self.params, token_id),
        )
        return chat_logprobs(self.model.tokenizer, visible)


class _Chunks:
    """The chunks of a streamed answer; each choice begins with its role."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer
        self._started: set[int] = set()
        self._num_generated = 0

    def chunks(self, item: PromptDelta) -> list[dict[str, Any]]:
        """The role if it is the choice's first delta, its text, and its end apart from both."""
        answer, delta = self._answer, item.delta
        self._num_generated += len(delta.token_ids)
        result = []
        if delta.index not in self._started:
            self._started.add(delta.index)
            result.append(self._chunk(delta.index, {"role": "assistant", "content": ""}))
        logprobs = answer.logprobs(delta.logprobs, delta.finish_reason)
        if delta.text or (logprobs and logprobs["content"]):
            result.append(self._chunk(delta.index, {"content": delta.text}, logprobs=logprobs))
        if delta.finish_reason is not None:
            result.append(self._chunk(delta.index, {}, finish_reason=delta.finish_reason))
        return result

    def last(self) -> list[dict[str, Any]]:
        """The usage, where it was asked for."""
        if not self._answer.asked.include_usage:
            return []
        used = usage(self._answer.num_prompt_tokens, self._num_generated)
        return [{**self._answer.envelope("chat.completion.chunk", []), "usage": used}]

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        chunk = self._answer.envelope("chat.completion.chunk", [choice])
        return {**chunk, "usage": None} if self._answer.asked.include_usage else chunk
