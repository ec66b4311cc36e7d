"""Checks what a request may do before any of it reaches the model."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import numpy as np

from llmc.errors import CapacityError, RequestError
from llmc.runtime.sampling_params import SamplingParams
from llmc.runtime.step import Int32

if TYPE_CHECKING:
    from llmc.runtime.tokenizer import Tokenizer

Prompt = str | Seq[int]


def as_prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A list of prompts from one or many; RequestError where it is neither."""
    if isinstance(prompts, str):
        return [prompts]
    token_ids = [item for item in prompts if isinstance(item, int | np.integer)]
    if not token_ids:
        return [item for item in prompts if not isinstance(item, int | np.integer)]
    if len(token_ids) < len(prompts):
        raise RequestError("prompts: token ids and prompts are mixed", param="prompt")
    return [token_ids]


def prompt_ids(
    prompt: Prompt, *, tokenizer: Tokenizer | None, vocab_size: int, context_length: int
) -> Int32:
    """The prompt's token ids `[n]` int32, n ≥ 1, all below `vocab_size`; RequestError otherwise.

    An id outside the vocabulary must not pass: the embedding would be read out of bounds.
    """
    ids = _encoded(prompt, tokenizer, context_length) if isinstance(prompt, str) else prompt
    try:
        array = np.asarray(ids)
    except (OverflowError, TypeError, ValueError) as exc:
        raise RequestError("prompt: expected text or a list of token ids", param="prompt") from exc
    if array.size == 0:
        raise RequestError("prompt: got no tokens, expected at least one", param="prompt")
    if array.ndim != 1 or array.dtype.kind not in "iu":
        items = array.ravel().tolist()
        odd = next((i for i in items if not isinstance(i, int) or abs(i) >= 1 << 63), ids)
        raise RequestError(
            f"prompt: {str(odd)[:60]!r}, expected text or a list of token ids from 0 to "
            f"{vocab_size - 1}",
            param="prompt",
        )
    wrong = np.flatnonzero((array < 0) | (array >= vocab_size))
    if wrong.size:
        raise RequestError(
            f"prompt: token id {array[wrong[0]]} at {wrong[0]}, expected 0 to {vocab_size - 1}",
            param="prompt",
        )
    return array.astype(np.int32)


def check_length(
    num_tokens: int, max_tokens: int, *, context_length: int, capacity_tokens: int
) -> None:
    """RequestError where the prompt and one token of `max_tokens` exceed the context.

    CapacityError where they exceed what the KV cache can hold.
    """
    needed = num_tokens + min(1, max_tokens)
    if needed > context_length:
        raise RequestError(
            f"prompt: {num_tokens} tokens and {needed - num_tokens} to come, at most "
            f"{context_length} fit the context",
            hint="shorten the prompt",
            param="prompt",
        )
    if needed > capacity_tokens:
        raise CapacityError(
            f"prompt: {num_tokens} tokens and {needed - num_tokens} to come, at most "
            f"{capacity_tokens} fit the KV cache",
            hint="start the engine with more kv_cache_tokens",
        )


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """RequestError where a parameter names a token outside the vocabulary."""
    named = {"stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias}
    for name, ids in named.items():
        largest = max(ids, default=0)
        if largest >= vocab_size:
            raise RequestError(
                f"{name}: token id {largest}, expected 0 to {vocab_size - 1}", param=name
            )


def _encoded(prompt: str, tokenizer: Tokenizer | None, context_length: int) -> list[int]:
    if tokenizer is None:
        raise RequestError(
            "prompt: the artifact has no tokenizer, expected token ids", param="prompt"
        )
    # A prompt that cannot fit is refused before it costs any work.
    most = context_length * tokenizer.max_token_chars
    if len(prompt) > most:
        raise RequestError(
            f"prompt: {len(prompt)} characters, at most {most} can fit the context", param="prompt"
        )
    return tokenizer.encode(prompt)
