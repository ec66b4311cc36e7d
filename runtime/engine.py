"""The engine: requests in, deltas out, one executor step at a time.

`step` is a chain of verbs: schedule, build the batch, run it, collect what came out. Where the
device can, the next batch begins before the last one's tokens are here. An engine
belongs to one thread; a server drives `submit`, `cancel` and `step` from its engine thread.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.artifact import Manifest
from llmc.errors import CapacityError, RequestError, UsageError
from llmc.runtime.batch import build_batch
from llmc.runtime.block_manager import BlockManager
from llmc.runtime.generation import Generation
from llmc.runtime.load import Limits, load_model
from llmc.runtime.outputs import ChoiceOutput, Delta, EngineStats, RequestOutput
from llmc.runtime.prompt import Prompt, as_prompts, check_length, check_params, prompt_ids
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.scheduler import Chunk, Scheduler
from llmc.runtime.scoring import score_text
from llmc.runtime.sequence import Sequence
from llmc.runtime.step import Draws, Float32, Int32, StepExecutor, StepOutput

if TYPE_CHECKING:
    from llmc.runtime.chat_template import ChatTemplate
    from llmc.runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that has begun; `draws` where the device chooses tokens."""

    chunks: list[Chunk]
    draws: Draws | None
    wait: Callable[[], StepOutput]


class Engine:
    """Serves one compiled model; not thread-safe."""

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | None = None,
        kv_cache_tokens: int | None = None,
        max_batch_tokens: int | None = None,
        max_sequences: int | None = None,
        max_waiting: int = 1024,
        random_weights: bool = False,
    ) -> None:
        """Opens the artifact folder `path` on `device` (KIND or KIND:INDEX; else its own kind).

        `kv_cache_tokens`: see `plan_num_pages`. `max_batch_tokens` (a step's) and `max_sequences`
        (computed together) can be lower than compiled. `max_waiting`: sequences in the queue.
        `random_weights` leaves the weight files unread: answers are noise, speed is the same.
        Raises ArtifactError, CapacityError (with the sum of bytes) or UsageError.
        """
        model = load_model(
            Path(path),
            device=device,
            kv_cache_tokens=kv_cache_tokens,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            random_weights=random_weights,
        )
        limits = Limits.of(
            model.manifest, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences
        )
        self._assemble(
            model.manifest,
            model.executor,
            num_pages=model.num_pages,
            tokenizer=model.tokenizer,
            chat_template=model.chat_template,
            sampling_defaults=model.sampling_defaults,
            limits=limits,
            max_waiting=max_waiting,
        )

    @classmethod
    def from_parts(
        cls,
        manifest: Manifest,
        executor: StepExecutor,
        *,
        num_pages: Seq[int],
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        max_batch_tokens: int | None = None,
        max_sequences: int | None = None,
        max_waiting: int = 1024,
    ) -> Engine:
        """An engine over an executor with `num_pages[g]` pages for each cache group g.

        `sampling_defaults` are fields of SamplingParams, see `default_sampling`.
        """
        engine = cls.__new__(cls)
        engine._assemble(
            manifest,
            executor,
            num_pages=num_pages,
            tokenizer=tokenizer,
            chat_template=chat_template,
            sampling_defaults=sampling_defaults or {},
            limits=Limits.of(
                manifest, max_batch_tokens=max_batch_tokens, max_sequences=max_sequences
            ),
            max_waiting=max_waiting,
        )
        return engine

    def _assemble(
        self,
        manifest: Manifest,
        executor: StepExecutor,
        *,
        num_pages: Seq[int],
        tokenizer: Tokenizer | None,
        chat_template: ChatTemplate | None,
        sampling_defaults: Mapping[str, Any],
        limits: Limits,
        max_waiting: int,
    ) -> None:
        if max_waiting < 1:
            raise UsageError(f"max_waiting is {max_waiting}, expected at least 1")
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.sampling_defaults = dict(sampling_defaults)
        self._executor = executor
        self._blocks = BlockManager(
            manifest.groups,
            num_pages,
            max_rows=limits.max_sequences + 1,  # one for `logits`
            max_length=manifest.model.context_length,
        )
        self._scheduler = Scheduler(
            self._blocks,
            max_batch_tokens=limits.max_batch_tokens,
            max_sequences=limits.max_sequences,
            max_logits_rows=limits.max_logits_rows,
        )
        self._max_waiting = max_waiting
        self._arrivals = itertools.count()
        self._request_numbers = itertools.count()
        self._generations: dict[Sequence, Generation] = {}
        self._requests: dict[str, list[Generation]] = {}  # choices that still run
        self._pending: list[Delta] = []  # for the next step to give out
        self._inboxes: dict[str, deque[Delta]] = {}  # of `generate` and `stream`
        self._begun: _Step | None = None  # behind the step that was given out last
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and answer: the context, or what the KV cache holds of it."""
        return self._blocks.max_length

    @property
    def stats(self) -> EngineStats:
        """A snapshot of the engine's state and counters."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_cache_usage_ratio=self._blocks.usage_ratio,
            num_steps_total=self._num_steps,
            num_preemptions_total=self._scheduler.num_preemptions,
            prompt_tokens_total=self._num_prompt_tokens,
            generation_tokens_total=self._num_generated_tokens,
        )

    # Requests

    def default_sampling(self, **given: Any) -> SamplingParams:  # noqa: ANN401 - SamplingParams'
        """Parameters as the model's own generation_config.json states them, but for the fields
        `given`; what neither states has SamplingParams' default. RequestError as there.
        """
        return SamplingParams(**{**self.sampling_defaults, **given})

    def submit(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Queues a request; its deltas come from `step`.

        Without `params` it is sampled by `default_sampling`; given ones are taken as they are.
        RequestError where it is malformed or too long, CapacityError where the queue is full or the
        prompt can never fit the KV cache.
        """
        params = params or self.default_sampling()
        self._enqueue(request_id, self._checked(prompt, params), params)

    def cancel(self, request_id: str) -> bool:
        """Ends a request and frees its pages; False where it is unknown or has ended.

        The next step gives a last delta with finish_reason "cancelled" for each choice.
        """
        choices = list(self._requests.get(request_id, ()))
        for generation in choices:
            self._pending.append(generation.end("cancelled"))
            self._retire(generation)
        return bool(choices)

    def has_work(self) -> bool:
        """Whether `step` has something to compute or to give out."""
        return bool(self._pending or self._requests)

    def step(self) -> list[Delta]:
        """Runs one step; the deltas of all choices that got a token or ended.

        A failing sampler or detokenizer ends its own choice with finish_reason "error"; a failing
        executor ends all running ones, and the engine goes on with those that wait.
        """
        deltas, self._pending = self._pending, []
        try:
            step = self._begun_step() or self._begin_step()
            if step is None:
                return deltas
            self._begun = self._begin_behind(step)
            output = step.wait()
        except Exception:
            running = list(self._scheduler.running)
            logger.exception("the executor failed; %d sequences end", len(running))
            self._begun = None
            return deltas + [self._fail(self._generations[s]) for s in running]
        token_ids = output.token_ids.tolist()
        row = rest = 0
        for chunk in step.chunks:
            count = chunk.num_logits_rows
            token_id = token_ids[row] if count else -1
            row += count
            count = 0 if token_id >= 0 else count
            rows = output.logits[rest : rest + count]
            rest += count
            if chunk.sequence in self._generations:  # else it ended while the step was under way
                delta = self._collect(chunk, rows, token_id)
                if delta is not None:
                    deltas.append(delta)
        return deltas

    # Convenience over requests

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers one or many prompts (texts or lists of token ids), in their order.

        `params` are for all prompts or one for each. All are checked before anything runs.
        """
        prompts = as_prompts(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or self.default_sampling()] * len(prompts)
        else:
            each = list(params)
        if len(each) != len(prompts):
            raise UsageError(f"{len(each)} params for {len(prompts)} prompts, expected as many")
        checked = [self._checked(p, q) for p, q in zip(prompts, each, strict=True)]
        outputs = {
            self._new_id("generate"): RequestOutput(
                prompt_token_ids=ids.tolist(), choices=[ChoiceOutput(index=i) for i in range(p.n)]
            )
            for ids, p in zip(checked, each, strict=True)
        }
        todo = deque(zip(outputs, checked, each, strict=True))
        inbox: deque[Delta] = deque()
        num_running = 0
        try:
            while todo or num_running:
                # The queue is bounded, a list of prompts need not be.
                while todo and (self._has_room(todo[0][2].n) or not self.has_work()):
                    request_id, ids, one = todo.popleft()
                    self._inboxes[request_id] = inbox
                    self._enqueue(request_id, ids, one)
                    num_running += one.n
                self._pump()
                while inbox:
                    delta = inbox.popleft()
                    outputs[delta.request_id].add(delta)
                    num_running -= delta.finish_reason is not None
        finally:
            for request_id in outputs:
                self._forget(request_id)
        return list(outputs.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """The deltas of one request as they come; closing the iterator cancels the request."""
        params = params or self.default_sampling()
        return self._stream(self._checked(prompt, params), params)

    def _stream(self, ids: Int32, params: SamplingParams) -> Iterator[Delta]:
        request_id = self._new_id("stream")
        inbox = self._inboxes[request_id] = deque()
        try:
            self._enqueue(request_id, ids, params)
            while request_id in self._requests or inbox:
                while inbox:
                    yield inbox.popleft()
                if request_id in self._requests:
                    self._pump()
        finally:
            self._forget(request_id)

    def logits(self, token_ids: Seq[int], *, chunk_tokens: int | None = None) -> Float32:
        """Logits `[T, V]` float32 after each of `token_ids` `[T]`; nothing is sampled.

        `chunk_tokens` tokens are computed a step, so that a chosen entry point is used. Uses pages
        of its own beside the running requests' and frees them.
        """
        parts = self.iter_logits(token_ids, chunk_tokens=chunk_tokens)
        scored = np.empty((len(token_ids), self.manifest.model.vocab_size), np.float32)
        for start, logits in parts:
            scored[start : start + len(logits)] = logits
        return scored

    def iter_logits(
        self, token_ids: Seq[int], *, chunk_tokens: int | None = None
    ) -> Iterator[tuple[int, Float32]]:
        """As `logits`, in parts `(start, [n, V])` that are valid until the next one.

        For long texts, whose logits would not fit into memory. The iterator holds pages until it is
        used up or closed.
        """
        if chunk_tokens is not None and chunk_tokens < 1:
            raise UsageError(f"chunk_tokens is {chunk_tokens}, expected at least 1")
        model = self.manifest.model
        ids = prompt_ids(
            token_ids,
            tokenizer=None,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
        )
        check_length(
            len(ids), 0, context_length=model.context_length, capacity_tokens=self.max_length
        )
        scheduler = self._scheduler
        chunk_tokens = chunk_tokens or scheduler.max_logits_rows
        return score_text(
            self._executor,
            self._blocks,
            ids,
            chunk_tokens=min(chunk_tokens, scheduler.max_batch_tokens),
            max_logits_rows=scheduler.max_logits_rows,
        )

    def chat_prompt(self, messages: Seq[Mapping[str, Any]], **extra: Any) -> list[int]:  # noqa: ANN401
        """A conversation as the model's chat template spells it, tokenized.

        `extra` goes to the template, e.g. `tools`. RequestError where the artifact has no template
        or the template refuses.
        """
        if self.chat_template is None or self.tokenizer is None:
            raise RequestError(
                f"{self.manifest.model.name} has no chat template",
                hint="send a plain prompt instead",
                param="messages",
            )
        text = self.chat_template.render(messages, **extra)
        return self.tokenizer.encode(text, add_special_tokens=False)

    # Inside

    def _checked(self, prompt: Prompt, params: SamplingParams) -> Int32:
        model = self.manifest.model
        ids = prompt_ids(
            prompt,
            tokenizer=self.tokenizer,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
        )
        check_params(params, model.vocab_size)
        check_length(
            len(ids),
            params.max_tokens,
            context_length=model.context_length,
            capacity_tokens=self.max_length,
        )
        return ids

    def _has_room(self, num_sequences: int) -> bool:
        return len(self._scheduler.waiting) + num_sequences <= self._max_waiting

    def _enqueue(self, request_id: str, ids: Int32, params: SamplingParams) -> None:
        """Makes a checked request's choices and queues them."""
        if request_id in self._requests:
            raise RequestError(f"request id {request_id[:60]!r} is in use", param="request_id")
        if not self._has_room(params.n):
            raise CapacityError(
                f"{len(self._scheduler.waiting)} sequences wait and {params.n} more were sent, "
                f"at most {self._max_waiting} can",
                hint="try again later",
            )
        choices = []
        for index in range(params.n):
            score_prompt = params.prompt_logprobs is not None and index == 0
            sequence = Sequence(ids, arrival=next(self._arrivals), score_prompt=score_prompt)
            detokenizer = self.tokenizer.detokenizer(ids) if self.tokenizer else None
            generation = Generation(
                request_id,
                index,
                sequence,
                params,
                model_stop_ids=self.manifest.model.stop_token_ids,
                max_length=self.max_length,
                detokenizer=detokenizer,
            )
            choices.append(generation)
        self._requests[request_id] = choices
        for generation in choices:
            self._generations[generation.sequence] = generation
            self._scheduler.add(generation.sequence)

    def _begun_step(self) -> _Step | None:
        """The step that began behind the last one, if it is still of use."""
        step, self._begun = self._begun, None
        if step is None:
            return None
        for chunk in step.chunks:
            chunk.sequence.num_ahead_tokens = 0
        if any(c.sequence in self._generations for c in step.chunks):
            return step
        step.wait()
        return None

    def _begin_step(self) -> _Step | None:
        """Schedules a step and begins it; None where there is nothing to do."""
        chunks = self._scheduler.schedule()
        if not chunks:
            return None
        inputs = build_batch(chunks, self._blocks)
        self._num_steps += 1
        draws = self._draws(chunks) if self._executor.chooses else None
        if draws is None:
            logits = self._executor.step(inputs)
            output = StepOutput(token_ids=np.full(len(logits), -1, np.int32), logits=logits)
            return _Step(chunks, None, lambda: output)
        if self._executor.begin is not None:
            return _Step(chunks, draws, self._executor.begin(inputs, draws))
        return _Step(chunks, draws, partial(self._executor.step_and_choose, inputs, draws))

    def _begin_behind(self, step: _Step) -> _Step | None:
        """Begins the step behind `step` before that has ended, so that the device need not wait for
        the host: None where it has to wait for tokens or for a newcomer.

        Sequences that turn out to have ended compute a token that nobody reads.
        """
        if self._executor.begin is None or step.draws is None:
            return None
        if len(step.draws.rows) < len(step.chunks):
            return None
        running = [
            (row, chunk.sequence, self._generations[chunk.sequence])
            for row, chunk in enumerate(step.chunks)
            if chunk.sequence in self._generations
        ]
        if len(running) < len(self._scheduler.running):
            return None
        going = [(row, sequence) for row, sequence, choice in running if choice.goes_on()]
        chunks = self._scheduler.schedule_ahead([sequence for _, sequence in going])
        draws = self._draws(chunks)
        if draws is None:
            return None
        inputs = build_batch(chunks, self._blocks)
        self._num_steps += 1
        chosen = np.array([row for row, _ in going], np.int32)
        return _Step(chunks, draws, self._executor.begin(inputs, draws, chosen))

    def _draws(self, chunks: list[Chunk]) -> Draws | None:
        """The rows whose tokens a device can choose, where there are any."""
        rows, drawn, row = [], [], 0
        for chunk in chunks:
            if chunk.end >= chunk.sequence.num_tokens and chunk.num_logits_rows == 1:
                draw = self._generations[chunk.sequence].draw()
                if draw is not None:
                    rows.append(row)
                    drawn.append(draw)
            row += chunk.num_logits_rows
        if not rows:
            return None
        return Draws(
            rows=np.array(rows, np.int32),
            top_k=np.array([top_k for top_k, _ in drawn], np.int32),
            settings=np.array([settings for _, settings in drawn], np.float32),
        )

    def _collect(self, chunk: Chunk, logits: Float32, token_id: int) -> Delta | None:
        """Takes what a chunk's step gave, a token that the device chose or, where it is -1,
        `logits` `[rows, V]`; a delta if a token came.
        """
        sequence = chunk.sequence
        generation = self._generations[sequence]
        sequence.num_computed_tokens = chunk.end
        last_prompt_position = sequence.num_prompt_tokens - 1
        if chunk.start <= last_prompt_position < chunk.end and not sequence.num_generated_tokens:
            self._num_prompt_tokens += sequence.num_prompt_tokens
        try:
            if sequence.score_prompt and sequence.num_scored_tokens < last_prompt_position:
                first_position = chunk.end - chunk.num_logits_rows
                generation.score_prompt(logits[: last_prompt_position - first_position])
            if chunk.end < sequence.num_tokens:
                return None
            delta = generation.advance(logits[-1]) if token_id < 0 else generation.take(token_id)
        except Exception:
            logger.exception("a sequence failed and ends")
            return self._fail(generation)
        self._num_generated_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._retire(generation)
        return delta

    def _fail(self, generation: Generation) -> Delta:
        self._retire(generation)
        return generation.end("error")

    def _retire(self, generation: Generation) -> None:
        """Takes a choice out of the queues and frees its pages."""
        self._scheduler.remove(generation.sequence)
        del self._generations[generation.sequence]
        choices = self._requests[generation.request_id]
        choices.remove(generation)
        if not choices:
            del self._requests[generation.request_id]

    def _pump(self) -> None:
        """One step whose deltas go to the inboxes; those without one wait for the next `step`."""
        unclaimed: list[Delta] = []
        for delta in self.step():
            inbox = self._inboxes.get(delta.request_id)
            (unclaimed if inbox is None else inbox).append(delta)
        self._pending = unclaimed + self._pending

    def _forget(self, request_id: str) -> None:
        """Drops a request of `generate` or `stream`, ended or not, with no delta."""
        self._inboxes.pop(request_id, None)
        for generation in list(self._requests.get(request_id, ())):
            self._retire(generation)

    def _new_id(self, kind: str) -> str:
        return f"{kind}-{next(self._request_numbers)}"
