"""The engine on a thread of its own, and asyncio's view of it.

Commands go in through a queue and run between two steps; deltas come out on the event loop, one
hand-over a step. Nothing but this thread touches the engine after `start`, its statistics and its
tokenizer apart.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from llmc.errors import CapacityError, LlmcError
from llmc.runtime.engine import Engine
from llmc.runtime.outputs import Delta
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.server.errors import ApiError, draining, engine_failed, too_busy
from llmc.runtime.server.metrics import ServerMetrics

log = logging.getLogger("llmc.server")

_Command = tuple[Callable[[], None], "Future[None]"]


@dataclass(frozen=True, slots=True)
class PromptDelta:
    """A delta and the prompt, by its place in the request, that it belongs to."""

    prompt: int
    delta: Delta


class DeltaStream:
    """The deltas of one HTTP request's prompts, in the order they were made."""

    def __init__(self, num_prompts: int, num_choices: int) -> None:
        """`num_choices` of each prompt; must be made on the event loop that reads it."""
        base = uuid.uuid4().hex
        self.request_ids = [f"{base}/{i}" for i in range(num_prompts)]
        self.loop = asyncio.get_running_loop()
        self._num_open = num_prompts * num_choices
        self._ready: list[PromptDelta] = []
        self._error: ApiError | None = None
        self._wake = asyncio.Event()

    def push(self, deltas: Sequence[PromptDelta], error: ApiError | None) -> None:
        """Adds what a step gave; on the event loop."""
        self._ready += deltas
        self._error = self._error or error
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[PromptDelta]]:
        """All deltas that are there, again and again until every choice has finished.

        Raises ApiError when the engine gave the request up.
        """
        while self._num_open:
            await self._wake.wait()
            self._wake.clear()
            ready, self._ready = self._ready, []
            if ready:
                self._num_open -= sum(item.delta.finish_reason is not None for item in ready)
                yield ready
            if self._error is not None:  # also when it was the last choice that failed
                raise self._error


@dataclass(slots=True)
class _Live:
    """The engine thread's side of one prompt."""

    stream: DeltaStream
    prompt: int
    num_open: int  # choices
    submitted: float
    last_token: dict[int, float]  # of each choice


class EngineThread:
    """Runs the engine and serves any number of concurrent requests from one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.metrics = ServerMetrics(lambda: engine.stats)
        self.draining = False
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._live: dict[str, _Live] = {}  # the engine thread's alone
        self._num_streams = 0  # the event loop's alone
        self._thread = threading.Thread(target=self._run, name="llmc-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step it is in; what still runs is given up."""
        self._commands.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread.is_alive()

    @property
    def num_streams(self) -> int:
        """HTTP requests that are being answered."""
        return self._num_streams

    @asynccontextmanager
    async def generate(
        self, prompts: Sequence[list[int]], params: SamplingParams
    ) -> AsyncIterator[DeltaStream]:
        """Submits `prompts` together; leaving the context cancels what has not finished.

        Raises RequestError where one is malformed, ApiError 429 where the queue is full and 503
        while draining.
        """
        if self.draining or not self.is_alive:
            raise draining()
        stream = DeltaStream(len(prompts), params.n)
        self._num_streams += 1
        try:
            await self._call(partial(self._submit, stream, prompts, params))
            yield stream
        finally:
            self._num_streams -= 1
            # After the submission in the queue, so it also undoes one whose caller has left.
            self._post(partial(self._cancel, stream))

    async def idle(self, timeout_s: float) -> bool:
        """Waits until no request is being answered; False when the time is over first."""
        deadline = time.monotonic() + timeout_s
        while self._num_streams and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return not self._num_streams

    async def fail_all(self, error: ApiError) -> None:
        """Gives up every request with `error`."""
        await self._call(partial(self._fail_all, error))

    def _post(self, action: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._commands.put((action, done))
        return done

    async def _call(self, action: Callable[[], None]) -> None:
        await asyncio.wrap_future(self._post(action))

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        while True:
            if not self._run_commands(wait=not self._live):
                return
            if self._live:
                self._step()

    def _run_commands(self, *, wait: bool) -> bool:
        """Runs what is in the queue, waiting for a first command if `wait`; False at the end."""
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            wait = False
            action, done = command
            if not done.set_running_or_notify_cancel():
                continue
            try:
                action()
            except Exception as exc:  # the caller's, who waits for it
                done.set_exception(exc)
            else:
                done.set_result(None)

    def _submit(
        self, stream: DeltaStream, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        now = time.monotonic()
        try:
            for index, (request_id, prompt) in enumerate(
                zip(stream.request_ids, prompts, strict=True)
            ):
                self.engine.submit(request_id, prompt, params)
                self._live[request_id] = _Live(stream, index, params.n, now, {})
        except LlmcError as exc:
            self._cancel(stream)
            # That a prompt fits the cache was checked before: what is full now is the queue.
            raise too_busy() if isinstance(exc, CapacityError) else exc from exc

    def _cancel(self, stream: DeltaStream) -> None:
        for request_id in stream.request_ids:
            if self._live.pop(request_id, None) is not None:
                self.engine.cancel(request_id)

    def _step(self) -> None:
        try:
            self._deliver(self.engine.step())
        except Exception:
            # The engine ends a failing sequence by itself; this is a fault of its own, or ours.
            log.exception("a step failed; all running requests are given up")
            self._fail_all(engine_failed())

    def _deliver(self, deltas: list[Delta]) -> None:
        now = time.monotonic()
        by_stream: dict[DeltaStream, list[PromptDelta]] = {}
        failed: set[DeltaStream] = set()
        for delta in deltas:
            live = self._live.get(delta.request_id)
            if live is None:
                continue
            self._observe(live, delta, now)
            by_stream.setdefault(live.stream, []).append(PromptDelta(live.prompt, delta))
            if delta.finish_reason is not None:
                live.num_open -= 1
                if not live.num_open:
                    del self._live[delta.request_id]
                if delta.finish_reason == "error":
                    failed.add(live.stream)
        _hand_over(
            [
                (stream, items, engine_failed() if stream in failed else None)
                for stream, items in by_stream.items()
            ]
        )

    def _observe(self, live: _Live, delta: Delta, now: float) -> None:
        if delta.token_ids:
            last = live.last_token.get(delta.index)
            if last is not None:
                self.metrics.inter_token_latency.observe(now - last)
            elif not live.last_token:
                self.metrics.time_to_first_token.observe(now - live.submitted)
            live.last_token[delta.index] = now
        if delta.finish_reason is not None and live.num_open == 1:
            self.metrics.e2e_latency.observe(now - live.submitted)

    def _fail_all(self, error: ApiError) -> None:
        streams = {live.stream for live in self._live.values()}
        for stream in streams:
            self._cancel(stream)
        _hand_over([(stream, [], error) for stream in streams])


def _hand_over(items: list[tuple[DeltaStream, list[PromptDelta], ApiError | None]]) -> None:
    """Pushes to all streams with one wake-up of their event loop."""
    if not items:
        return

    def push_all() -> None:
        for stream, deltas, error in items:
            stream.push(deltas, error)

    try:
        items[0][0].loop.call_soon_threadsafe(push_all)
    except RuntimeError:  # the loop has been closed: nobody is left to read
        log.debug("%d streams had no reader", len(items))
