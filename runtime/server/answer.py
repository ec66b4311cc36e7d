"""Runs one request on the engine and sends its answer, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmc.errors import LlmcError
from llmc.runtime.logprobs import TokenLogprob
from llmc.runtime.outputs import ChoiceOutput, RequestOutput
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.server.engine_thread import DeltaStream, EngineThread, PromptDelta
from llmc.runtime.server.errors import as_api_error, error_body, error_response

Result = TypeVar("Result")


class ChunkWriter(Protocol):
    """Turns deltas into the JSON chunks of one stream."""

    def chunks(self, item: PromptDelta) -> list[dict[str, Any]]:
        """What a delta adds to the stream."""

    def last(self) -> list[dict[str, Any]]:
        """What follows the last delta."""


async def collect(
    thread: EngineThread, prompts: list[list[int]], params: SamplingParams
) -> list[RequestOutput]:
    """Runs `prompts` to their end; one output for each."""
    async with thread.generate(prompts, params) as stream:
        outputs = [
            RequestOutput(
                prompt_token_ids=prompt,
                choices=[ChoiceOutput(index=i) for i in range(params.n)],
            )
            for prompt in prompts
        ]
        async for items in stream:
            for item in items:
                outputs[item.prompt].add(item.delta)
    return outputs


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Awaits `work`; when the client leaves first, cancels it and raises ClientDisconnect.

    The request's body must have been read, so that the next message can only be the disconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events; errors before the first are plain error responses.

    The engine is asked only once the response is being sent: nothing can start and be forgotten.
    """

    media_type = "text/event-stream"

    def __init__(
        self, generation: AbstractAsyncContextManager[DeltaStream], writer: ChunkWriter
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        # Starlette has put the length of an empty body there.
        del self.headers["content-length"]
        self._generation = generation
        self._writer = writer
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until the answer ends or the client leaves."""
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientDisconnect:
            return
        except LlmcError as exc:
            if not self._started:
                await error_response(exc)(scope, receive, send)
                return
            await _send_events(send, [error_body(as_api_error(exc))])
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, send: Send) -> None:
        async with self._generation as stream:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._started = True
            async for items in stream:
                await _send_events(
                    send, [chunk for item in items for chunk in self._writer.chunks(item)]
                )
            await _send_events(send, self._writer.last())
            await send(
                {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}
            )


async def _send_events(send: Send, chunks: list[dict[str, Any]]) -> None:
    if chunks:
        body = "".join(f"data: {_compact(chunk)}\n\n" for chunk in chunks).encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def visible_logprobs(
    entries: list[TokenLogprob] | None, *, finish_reason: str | None, is_stop: Callable[[int], bool]
) -> list[TokenLogprob]:
    """The entries without the stop token that ended the answer: it is no part of the text."""
    entries = entries or []
    if entries and finish_reason == "stop" and is_stop(entries[-1].token_id):
        return entries[:-1]
    return entries


def usage(num_prompt_tokens: int, num_generated_tokens: int) -> dict[str, int]:
    """The `usage` object."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_generated_tokens,
        "total_tokens": num_prompt_tokens + num_generated_tokens,
    }
