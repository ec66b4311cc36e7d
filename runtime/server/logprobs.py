"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from llmc.runtime.logprobs import TokenLogprob
from llmc.runtime.tokenizer import Tokenizer

# Stands for minus infinity, which JSON cannot say; OpenAI's documentation names this value.
_LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions: a list of tokens with their alternatives."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, entry.token_id, entry.logprob),
                "top_logprobs": [_chat_token(tokenizer, *item) for item in entry.top],
            }
            for entry in entries
        ]
    }


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": max(logprob, _LOWEST),
        "bytes": list(raw),
    }


class CompletionLogprobs:
    """`choices[].logprobs` of completions for one choice: parallel lists, with running offsets."""

    def __init__(self, tokenizer: Tokenizer, *, offset: int = 0) -> None:
        """`offset`: characters of the answer's text before the first token."""
        self._tokenizer = tokenizer
        self._offset = offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of_prompt(self, token_ids: list[int], entries: list[TokenLogprob | None]) -> dict[str, Any]:
        """For an echoed prompt; its first token has no log-probability."""
        return self._lists(list(zip(token_ids, entries, strict=True)))

    def of(self, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
        """For the next generated tokens."""
        return self._lists([(entry.token_id, entry) for entry in entries])

    def _lists(self, items: list[tuple[int, TokenLogprob | None]]) -> dict[str, Any]:
        result: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token_id, entry in items:
            result["tokens"].append(self._spelling(token_id))
            result["text_offset"].append(self._offset)
            if not self._tokenizer.is_special(token_id):  # special tokens have no text
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
            if entry is None:
                result["token_logprobs"].append(None)
                result["top_logprobs"].append(None)
                continue
            result["token_logprobs"].append(max(entry.logprob, _LOWEST))
            top = {self._spelling(i): max(logprob, _LOWEST) for i, logprob in entry.top}
            result["top_logprobs"].append(top)
        return result

    def _spelling(self, token_id: int) -> str:
        r"""The token's text; `bytes:\xe2\x80` where it is no whole characters."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
