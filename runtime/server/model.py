"""The served model as routes see it: name, tokenizer, and prompts made ready for the engine."""

from __future__ import annotations

import asyncio
import datetime
from dataclasses import dataclass
from typing import Any

from llmc.runtime.engine import Engine
from llmc.runtime.prompt import check_length, prompt_ids
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.server.engine_thread import EngineThread
from llmc.runtime.server.errors import ApiError, invalid
from llmc.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What one client may ask for; SamplingParams bounds the rest."""

    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    max_choices: int = 128  # prompts times n of one request
    max_open_requests: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One engine behind the API."""

    thread: EngineThread
    tokenizer: Tokenizer
    limits: ServerLimits

    @property
    def engine(self) -> Engine:
        """Only for what does not change after its start, such as manifest and tokenizer."""
        return self.thread.engine

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.engine.manifest.model.name

    @property
    def card(self) -> dict[str, Any]:
        """The model as an entry of /v1/models."""
        created = datetime.datetime.fromisoformat(self.engine.manifest.created)
        return {
            "id": self.name,
            "object": "model",
            "created": int(created.timestamp()),
            "owned_by": "llmc",
            "context_length": self.engine.max_length,
        }

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 unless `name` is this model's; no name means this one."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model {name[:80]!r} does not exist",
                hint=f"this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def is_stop(self, params: SamplingParams, token_id: int) -> bool:
        """Whether a token ends an answer without being a part of it."""
        own = () if params.ignore_eos else self.engine.manifest.model.stop_token_ids
        return token_id in own or token_id in params.stop_token_ids

    async def encode(
        self, prompts: list[str | list[int]], params: SamplingParams
    ) -> list[list[int]]:
        """The prompts' checked token ids; the work is done off the event loop.

        Raises RequestError, or CapacityError where one can never fit the KV cache.
        """
        if not prompts:
            raise invalid("prompt: got an empty list, expected at least one prompt", param="prompt")
        if len(prompts) * params.n > self.limits.max_choices:
            raise invalid(
                f"{len(prompts)} prompts with n = {params.n}: expected at most "
                f"{self.limits.max_choices} choices in one request",
                param="n",
            )
        return await asyncio.to_thread(
            lambda: [self._checked(prompt, params.max_tokens) for prompt in prompts]
        )

    async def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation's token ids; template and tokenizer run off the event loop."""
        return await asyncio.to_thread(self.engine.chat_prompt, messages)

    def room_tokens(self, prompt: list[int]) -> int:
        """Tokens that an answer to `prompt` can have."""
        return self.engine.max_length - len(prompt)

    def _checked(self, prompt: str | list[int], max_tokens: int) -> list[int]:
        model = self.engine.manifest.model
        ids = prompt_ids(
            prompt,
            tokenizer=self.tokenizer,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
        )
        check_length(
            len(ids),
            max_tokens,
            context_length=model.context_length,
            capacity_tokens=self.engine.max_length,
        )
        token_ids: list[int] = ids.tolist()
        return token_ids
