"""The requests of OpenAI's API as far as they are served, and what they ask of the engine.

Fields that would change the answer are either served or refused by name; fields that would not
(`user`, `metadata`, …) are ignored. `null` means absent, as everywhere in that API.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llmc.runtime.engine import Engine
from llmc.runtime.sampling_params import MAX_LOGPROBS, SamplingParams
from llmc.runtime.server.errors import ApiError, invalid

_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Fields that are not served, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

_Model = TypeVar("_Model", bound="_Request")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """What a stream carries beside its text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis: never added


class _Request(_Strict):
    """What completions and chat have in common; SamplingParams checks the ranges."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    n: int = 1
    max_tokens: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, engine: Engine, **more: Any) -> SamplingParams:  # noqa: ANN401 - its fields
        names = (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "stop",
            "stop_token_ids",
            "ignore_eos",
            "min_tokens",
            "n",
        )
        fields = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.logit_bias is not None:
            fields["logit_bias"] = _token_biases(self.logit_bias)
        return engine.default_sampling(**fields, **more)


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, however they were given."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]

    def sampling_params(self, engine: Engine) -> SamplingParams:
        """What the engine is asked for; what the client leaves open, the model states, if it does.

        RequestError where a value is out of range.
        """
        max_tokens = _DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        scored = self.logprobs if self.echo else None
        if max_tokens == 0 and scored is None:
            raise invalid(
                "max_tokens: got 0, expected at least 1, or echo with logprobs", param="max_tokens"
            )
        return self._sampling(
            engine, max_tokens=max_tokens, logprobs=self.logprobs, prompt_logprobs=scored
        )


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = ""
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        # Templates were written before the newer name of the same role.
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def sampling_params(self, engine: Engine, *, room_tokens: int) -> SamplingParams:
        """What the engine is asked for; without a limit an answer may fill `room_tokens`."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("max_tokens and max_completion_tokens: expected one", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs: expected logprobs to be true", param="top_logprobs")
        num_top = self.top_logprobs or 0
        if not 0 <= num_top <= MAX_LOGPROBS:
            raise invalid(
                f"top_logprobs: got {num_top}, expected 0 to {MAX_LOGPROBS}", param="top_logprobs"
            )
        limits = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        max_tokens = limits[0] if limits else max(1, room_tokens)
        if max_tokens == 0:
            raise invalid("max_tokens: got 0, expected at least 1", param="max_tokens")
        return self._sampling(
            engine, max_tokens=max_tokens, logprobs=num_top if self.logprobs else None
        )


def parse(kind: type[_Model], body: dict[str, Any]) -> _Model:
    """`body` as a request of `kind`; ApiError 400 naming the first field that is wrong."""
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _IGNORED:
            continue
        if name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                raise _unsupported(name)
            continue
        fields[name] = value
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_plain_message(message) for message in fields["messages"]]
    try:
        return kind.model_validate(fields)
    except ValidationError as exc:
        raise _explained(exc) from exc


def _plain_message(message: object) -> object:
    """Drops what an SDK's message object carries without a value, such as `tool_calls: null`."""
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function") or message.get("tool_calls"):
        raise _unsupported("tools")
    for part in message["content"] if isinstance(message.get("content"), list) else ():
        if isinstance(part, dict) and part.get("type") not in (None, "text"):
            raise invalid(
                f"messages: content of type {str(part['type'])[:40]!r} is not supported, "
                "expected 'text'",
                param="messages",
                code="unsupported_content",
            )
    return {name: value for name, value in message.items() if value not in (None, [])}


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    """JSON's keys are strings; the token ids in them are decimal."""
    result: dict[int, float] = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise invalid(f"logit_bias: got {key[:40]!r}, expected a token id", param="logit_bias")
        result[int(key)] = bias
    return result


def _unsupported(name: str) -> ApiError:
    return invalid(f"{name} is not supported yet", param=name, code="unsupported_parameter")


def _explained(exc: ValidationError) -> ApiError:
    """The first thing that is wrong, by its path; nothing of pydantic's own wording on unions."""
    error = exc.errors(include_url=False, include_context=False)[0]
    # In unions the path goes on with the tried types' names; the field is its first name.
    field = str(error["loc"][0]) if error["loc"] else "body"
    if error["type"] == "extra_forbidden":
        path = ".".join(str(part) for part in error["loc"])
        return invalid(f"unknown field {path[:80]!r}", param=field, code="unknown_parameter")
    if error["type"] == "missing":
        path = ".".join(str(part) for part in error["loc"])
        return invalid(f"missing field {path[:80]!r}", param=field, code="missing_parameter")
    expected = {
        "prompt": "a text, a list of texts, a list of token ids or a list of such lists",
        "stop": "a text or a list of texts",
    }.get(field)
    if expected is None:
        path = ".".join(str(part) for part in error["loc"])
        return invalid(f"{path[:80]}: {error['msg'][:120]}", param=field)
    return invalid(f"{field}: expected {expected}", param=field)
