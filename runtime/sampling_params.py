"""How one request's tokens are chosen and when it ends; every field is checked on construction."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from llmc.errors import RequestError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request; RequestError names the first field out of range.

    Defaults follow the OpenAI API (temperature 1, the whole distribution), but for `max_tokens`,
    which is 128. `temperature` 0 is greedy. The order is: penalties and bias, temperature, top_k,
    top_p (of what top_k leaves), min_p. Log-probabilities are the model's own, before all of it.
    """

    max_tokens: int = 128  # 0 only scores the prompt and needs prompt_logprobs
    temperature: float = 1.0  # 0 to 100
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # (0, 1]
    min_p: float = 0.0  # [0, 1], share of the likeliest token's probability
    seed: int | None = None  # 64 bits; the same seed gives the same tokens in any batch
    presence_penalty: float = 0.0  # [-2, 2], over generated tokens
    frequency_penalty: float = 0.0  # [-2, 2], over generated tokens
    repetition_penalty: float = 1.0  # (0, 100], over prompt and generated tokens
    stop: str | Seq[str] = ()  # text from a stop string on is not given out
    stop_token_ids: Seq[int] = ()  # beside the model's own
    ignore_eos: bool = False  # the model's own stop tokens do not stop
    min_tokens: int = 0  # no stop token is sampled, and no stop string found, before
    logprobs: int | None = None  # the chosen token's and this many of the likeliest; None = none
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> [-100, 100]

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 0, _INT32_MAX)
        _number("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0, _INT32_MAX)
        _number("top_p", self.top_p, 0, 1, open_low=True)
        _number("min_p", self.min_p, 0, 1)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _number("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        _integer("n", self.n, 1, MAX_CHOICES)
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", self.ignore_eos, "true or false")
        _integer("min_tokens", self.min_tokens, 0, _INT32_MAX)
        if self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise _wrong("max_tokens", 0, "at least 1, or prompt_logprobs with it")
        object.__setattr__(self, "stop", self._checked_stops())
        object.__setattr__(self, "stop_token_ids", self._checked_stop_token_ids())
        object.__setattr__(self, "logit_bias", self._checked_logit_bias())

    def _checked_stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        _sequence("stop", stops, MAX_STOPS)
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise _wrong("stop", stop, f"strings of 1 to {MAX_STOP_CHARS} characters")
        return tuple(stops)

    def _checked_stop_token_ids(self) -> tuple[int, ...]:
        _sequence("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, _INT32_MAX)
        return tuple(self.stop_token_ids)

    def _checked_logit_bias(self) -> dict[int, float]:
        if not isinstance(self.logit_bias, Mapping):
            raise _wrong("logit_bias", self.logit_bias, "an object of token ids and biases")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise _wrong("logit_bias", len(self.logit_bias), f"at most {MAX_LOGIT_BIASES} entries")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, _INT32_MAX)
            _number("logit_bias", bias, -100, 100)
        return dict(self.logit_bias)


def _integer(name: str, value: Any, low: int, high: int) -> None:  # noqa: ANN401 - client input
    # bool is an int to Python, not to a client.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _wrong(name, value, f"an integer from {low} to {high}")


def _number(
    name: str,
    value: Any,  # noqa: ANN401 - client input
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> None:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails every comparison, infinity the bounds.
    if not numeric or not low <= value <= high or (open_low and value == low):
        above = f"above {low} and at most" if open_low else f"from {low} to"
        raise _wrong(name, value, f"a number {above} {high}")


def _sequence(name: str, value: Any, limit: int) -> None:  # noqa: ANN401 - client input
    if not isinstance(value, Seq) or isinstance(value, str | bytes):
        raise _wrong(name, value, "a list")
    if len(value) > limit:
        raise _wrong(name, f"{len(value)} entries", f"at most {limit}")


def _wrong(name: str, value: object, expected: str) -> RequestError:
    try:
        shown = str(value)[:60]
    except ValueError:  # Python refuses to print integers of thousands of digits
        shown = f"a huge {type(value).__name__}"
    return RequestError(f"{name}: got {shown!r}, expected {expected}", param=name)
